"""Shards one after the other, each with a note of what is in it; and the notes of all shards joined into an index.

A shard counts as done when its note lies beside it, so an interrupted build goes on with the next shard, parts of a
build need nothing of one another, and whoever joins them reads notes instead of images.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from shards import scan
from shards.errors import DataError
from shards.index import Index
from shards.options import BuildOptions
from shards.place import partial_of
from shards.plan import Plan
from shards.tars import write_tar
from shards.workers import Task, Work, write_note, write_shards

_FEW = 2000  # files for which another process is not worth its start
_THREADS = 4  # that one process keeps busy (workers.py says why)
_KEEP = {"test": 0, "val": 1, "train": 2}  # of images with the same pixels, the first of these
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Joined:
    """An index, and what is not in it."""

    index: Index
    quarantined: int  # files, or frames, that cannot be read
    dropped: int  # duplicates


def write_part(folder: Path, plan: Plan, options: BuildOptions, drop: frozenset[str], progress: Progress) -> None:
    """Write the shards of `options.part` that are not there yet. DataError when worker processes die."""
    for path in folder.glob("shard-*"):  # of an earlier build with more shards
        if int(path.name[6:12]) >= len(plan.shards):
            path.unlink(missing_ok=True)  # tasks of an array that start together all delete it
    mine = plan.part(*options.part)
    todo = [number for number in mine if not _is_done(folder, number, plan)]
    total, left = (sum(len(plan.shards[number]) for number in numbers) for numbers in (mine, todo))
    progress(total - left, total)
    note = {"plan": plan.digest, "files": plan.files, "of": len(plan.shards), "parts": options.part[1]}
    note |= {"channels": options.channels}
    for number in set(mine) - set(todo):  # kept, and of this attempt too; `_survey` asks which is newest
        write_note(_note(folder, number), _read(folder, number) | note)
    tasks = [Task(folder / _tar(n), plan.shards[n], note | {"state": plan.states[n]}) for n in todo]
    workers = options.workers or os.cpu_count() or 1
    processes = max(1, min(-(-workers // _THREADS), len(tasks), left // _FEW))
    work = Work(options, drop, threads=-(-workers // processes))
    write_shards(tasks, work, processes, lambda done: progress(total - left + done, total))


def join(out: Path, progress: Progress) -> Joined:
    """The index of all shards in the unfinished folder of `out`. DataError when a part is missing or is another's."""
    folder = partial_of(out)
    count, channels, twins = _survey(folder, out)
    tally: Counter[str] = Counter()
    set_aside = folder / "quarantine.jsonl.new"
    with set_aside.open("w", encoding="utf-8") as file:
        index = scan.write_index(folder, _kept(folder, count, twins, file, tally, progress), channels=channels)
    os.replace(set_aside, folder / "quarantine.jsonl")
    if not (tally["quarantined"] or tally["twins"]):
        (folder / "quarantine.jsonl").unlink()
    named = {shard["name"] for shard in index.shards}
    for number in range(count):
        _note(folder, number).unlink()
        if _tar(number) not in named:  # nothing in it could be read
            (folder / _tar(number)).unlink()
    return Joined(index, tally["quarantined"], tally["dropped"] + tally["twins"])


def _kept(
    folder: Path, count: int, twins: dict[str, str], file: TextIO, tally: Counter[str], progress: Progress
) -> Iterator[tuple[dict[str, Any], list[scan.Record]]]:
    """What goes into the index, shard by shard. What does not goes into `file` and `tally`."""
    first = {}
    for number in range(count):
        note = _read(folder, number)
        about, records = note["about"], note["records"]
        doubles = [record["key"] for record in records if record["key"] in twins]
        lines = note["bad"] + [{"key": key, "reason": twins[key]} for key in doubles]
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        tally.update(quarantined=len(note["bad"]), dropped=note["dropped"], twins=len(doubles), samples=len(records))
        first = first or next(iter(note["bad"]), {})
        if doubles:
            about, records = _without(folder / _tar(number), twins)
        if records:
            yield about, records
        progress(number + 1, count)
    if not tally["samples"]:
        why = f"the first, {first['path']}: {first['reason']}" if first else "the audit drops them all"
        raise DataError(f"none of {tally.total():,} images can be read; {why}")


def _is_done(folder: Path, number: int, plan: Plan) -> bool:
    try:
        note = _read(folder, number)
        same = note["state"] == plan.states[number] and note["plan"] == plan.digest
        return same and (folder / _tar(number)).stat().st_size == note["about"]["bytes"]
    except (DataError, OSError, KeyError, TypeError):
        return False


def _survey(folder: Path, out: Path) -> tuple[int, int, dict[str, str]]:
    """(shards, channels, what `_twins` finds). DataError unless all shards are there, and of one build."""
    numbers = sorted(int(path.stem[6:]) for path in folder.glob("shard-*.json"))
    if not numbers:
        raise DataError(
            f"{out} has no parts to join: run `python -m shards build --part 1/N ... --out {out}` and so on"
        )
    # What is not like the newest part is of an earlier attempt, and some files of it may have changed since.
    newest = max(numbers, key=lambda number: _note(folder, number).stat().st_mtime_ns)
    last = _read(folder, newest)
    same: dict[int, list[tuple[int, str, list[str]]]] = {}
    for number in range(last["of"]):
        part = f"part {number % last['parts'] + 1}/{last['parts']}"
        if number not in numbers or not (folder / _tar(number)).is_file():
            raise DataError(f"{_tar(number)} is not there: run {part} of the build, or again; it goes on where it was")
        note = _read(folder, number)
        if note["plan"] != last["plan"]:
            raise DataError(
                f"{_tar(number)} is of another build than {_tar(newest)} (other files, table or options): run "
                f"{part} again, with the same command as the others"
            )
        if note.get("files") != last.get("files"):
            raise DataError(
                f"{_tar(number)} may be out of date: files were changed before {_tar(newest)} was written. Run {part} "
                "again, which packs only what changed (parts that read copies of their own need copies with the same "
                "times: cp -a)"
            )
        for record in note["records"]:
            if record["pixels"]:
                rank = 2 * _KEEP.get(record["split"], 3) + (not record["labels"])
                same.setdefault(record["pixels"], []).append((rank, record["key"], record["labels"]))
    return last["of"], last["channels"], _twins(same)


def _twins(same: dict[int, list[tuple[int, str, list[str]]]]) -> dict[str, str]:
    """{key: reason} of samples with the pixels of another, which is kept: the one that evaluation needs most."""
    found = {}
    for samples in same.values():
        _, best, names = min(samples, key=lambda sample: sample[0])
        for _, key, labels in samples:
            if key != best:
                other = f", but labelled {'|'.join(labels)}, not {'|'.join(names)}" if labels != names else ""
                found[key] = f"the same pixels as {best}{other}"
    return found


def _without(path: Path, keys: dict[str, str]) -> tuple[dict[str, Any], list[scan.Record]]:
    """The shard again, without some samples."""
    new = path.with_name(path.name + ".new")
    with path.open("rb") as file:

        def read(member: scan.Member) -> bytes:
            file.seek(member[0])
            return file.read(member[1])

        kept = ((key, members) for key, members in scan.samples(path) if key not in keys)
        write_tar(new, ({"__key__": key, **{k: read(m) for k, m in members.items()}} for key, members in kept))
    os.replace(new, path)
    return scan.shard(path)


def _read(folder: Path, number: int) -> dict[str, Any]:
    try:
        return json.loads(_note(folder, number).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{_note(folder, number)} cannot be read: run that part of the build again") from None


def _tar(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _note(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.json"
