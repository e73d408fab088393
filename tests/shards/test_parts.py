"""One build, an interrupted one, one of several processes and one in parts: the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from shards import parts, workers
from shards.__main__ import main
from shards.build import build, build_part, gather, join
from shards.errors import DataError
from shards.index import Index
from shards.options import BuildOptions
from shards.place import partial_of
from shards.plan import plan
from shards.table import find_images

SEVEN = BuildOptions(shard_size="7", split="60/40", workers=1)


def quiet(done: int, total: int) -> None:
    pass


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def age(out: Path, numbers: Sequence[int] | None = None) -> None:
    """The shards there are (or some) were noted an hour ago."""
    for note in sorted(partial_of(out).glob("shard-*.json")):
        if numbers is None or int(note.stem[6:]) in numbers:
            os.utime(note, (time.time() - 3600, time.time() - 3600))


@pytest.fixture
def mixed(photos: Path, tmp_path: Path, jpeg: Callable[..., bytes]) -> Path:
    """20 images; one is damaged, and two pairs are the same picture."""
    images = tmp_path / "mixed"
    images.mkdir()
    for i in range(20):
        (images / f"{i:02d}.jpg").write_bytes(jpeg(min(i, 17)))
    (images / "copy-of-00.jpg").write_bytes(jpeg(0))
    (images / "05.jpg").write_bytes(jpeg(5)[:200])
    return images


@pytest.fixture
def whole(mixed: Path, tmp_path: Path) -> dict[str, str]:
    build(mixed, tmp_path / "whole", options=replace(SEVEN, drop_duplicates="exact"))
    return digests(tmp_path / "whole")


def test_parts_in_any_order_are_one_build(mixed: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "parts"
    for number in (3, 1):
        build_part(mixed, out, None, replace(SEVEN, drop_duplicates="exact", part=(number, 3)), quiet)
    with pytest.raises(DataError, match=r"shard-000001.tar is not there: run part 2/3"):
        join(out)
    build_part(mixed, out, None, replace(SEVEN, drop_duplicates="exact", part=(2, 3)), quiet)
    assert join(out).quarantined == 1
    assert digests(out) == whole
    assert not partial_of(out).exists()


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_an_interrupted_build_goes_on_where_it_was(
    mixed: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    out, options, real = tmp_path / "out", replace(SEVEN, drop_duplicates="exact"), workers.write_shard
    written: list[str] = []

    def write(task: workers.Task, work: workers.Work, tick: workers.Tick) -> None:
        if len(written) == stop_at:
            task.path.with_name(task.path.name + ".new").write_bytes(b"half a ta")
            raise KeyboardInterrupt
        real(task, work, tick)
        written.append(task.path.name)

    monkeypatch.setattr(workers, "write_shard", write)
    with pytest.raises(KeyboardInterrupt):
        build(mixed, out, options=options)
    assert not out.exists()
    first, stop_at = list(written), 99
    seen: list[tuple[int, int]] = []
    build(mixed, out, options=options, progress=lambda done, total: seen.append((done, total)))
    assert written == [f"shard-{i:06d}.tar" for i in range(3)]
    assert seen[0] == (7 * len(first), 21)
    assert digests(out) == whole


def test_what_changed_in_between_is_packed_again(mixed: Path, tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    out = tmp_path / "out"
    build_part(mixed, out, None, SEVEN, quiet)
    before = {path.name: path.stat().st_ino for path in partial_of(out).glob("*.tar")}
    (mixed / "01.jpg").write_bytes(jpeg(1))  # the same size, at another time
    os.utime(mixed / "01.jpg", (time.time() + 5, time.time() + 5))
    build_part(mixed, out, None, SEVEN, quiet)
    after = {path.name: path.stat().st_ino for path in partial_of(out).glob("*.tar")}
    assert sum(before[name] != after[name] for name in before) == 1  # a new file took its place
    build_part(mixed, out, None, replace(SEVEN, shard_size="11", short_side=20), quiet)
    assert len(list(partial_of(out).glob("*.tar"))) == 2  # those of the larger build are gone
    join(out)
    build(mixed, tmp_path / "fresh", options=replace(SEVEN, shard_size="11", short_side=20))
    assert digests(out) == digests(tmp_path / "fresh")


def test_parts_of_different_builds_are_not_joined(mixed: Path, tmp_path: Path) -> None:
    build_part(mixed, tmp_path / "out", None, replace(SEVEN, part=(1, 2)), quiet)
    age(tmp_path / "out")
    build_part(mixed, tmp_path / "out", None, replace(SEVEN, part=(2, 2), quality=50), quiet)
    with pytest.raises(DataError, match=r"shard-000000.tar is of another build than shard-000001.tar .* run part 1/2"):
        join(tmp_path / "out")
    with pytest.raises(DataError, match="has no parts to join"):
        join(tmp_path / "elsewhere")
    assert not partial_of(tmp_path / "elsewhere").exists()


def test_parts_without_the_masks_of_the_others_are_not_joined(
    photos: Path, tmp_path: Path, write_table: Callable[..., Path]
) -> None:
    """Both tasks of an array ran, the table gained a column of masks, and when they ran again the first one failed."""
    out, options = tmp_path / "out", [BuildOptions(shard_size="10", part=(number, 2), workers=1) for number in (1, 2)]
    names = sorted(path.relative_to(photos / "images").as_posix() for path in photos.glob("images/*/*.jpg"))
    mask = tmp_path / "mask.png"
    Image.new("L", (64, 48), 255).save(mask)
    table = write_table(tmp_path / "t.csv", [{"path": name} for name in names])
    for each in options:
        build_part(photos / "images", out, table, each, quiet)
    age(out)
    write_table(table, [{"path": name, "mask": str(mask)} for name in names])
    build_part(photos / "images", out, table, options[1], quiet)
    with pytest.raises(DataError, match=r"shard-000000.tar is of another build than shard-00000\d.tar .* run part 1/2"):
        join(out)
    build_part(photos / "images", out, table, options[0], quiet)
    index = join(out).index
    assert all(index.read(i).mask for i in range(len(index)))


@pytest.mark.parametrize("replaced", ["an image", "a mask"])
def test_a_part_that_missed_a_change_is_not_joined(
    photos: Path, tmp_path: Path, write_table: Callable[..., Path], replaced: str
) -> None:
    """A file of the first part became another of equal size, and only the second part ran after that."""
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(photos / "images", images)
    names = sorted(path.relative_to(images).as_posix() for path in images.glob("*/*.jpg"))
    for n, _ in enumerate(names):
        Image.new("L", (64, 48), 255).save(tmp_path / f"{n}.png")
    table = write_table(
        tmp_path / "t.csv", [{"path": p, "mask": str(tmp_path / f"{n}.png")} for n, p in enumerate(names)]
    )
    options = [BuildOptions(shard_size="10", part=(number, 2), workers=1) for number in (1, 2)]
    for each in options:
        build_part(images, out, table, each, quiet)
    mine = plan(gather(images, find_images(images).images, table, options[0]), options[0]).shards[0][0]
    changed = mine.image if replaced == "an image" else mine.mask
    assert changed is not None
    changed.write_bytes(changed.read_bytes()[:-2] + b"\0\0")
    os.utime(changed, (time.time() + 5, time.time() + 5))
    age(out)
    build_part(images, out, table, options[1], quiet)
    with pytest.raises(DataError, match=r"shard-000000.tar may be out of date: .* shard-00000\d.tar .* Run part 1/2"):
        join(out)
    build_part(images, out, table, options[0], quiet)
    join(out)
    build(images, tmp_path / "fresh", table, replace(options[0], part=(1, 1)))
    assert digests(out) == digests(tmp_path / "fresh")


def test_the_part_that_is_named_may_be_the_newer_one(mixed: Path, tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    """Clocks of file servers are no proof: who runs the part that was named gets on to the other in any case."""
    out, options = tmp_path / "out", [replace(SEVEN, part=(number, 2)) for number in (1, 2)]
    build_part(mixed, out, None, options[0], quiet)
    os.utime(mixed / "01.jpg", (time.time() + 5, time.time() + 5))
    build_part(mixed, out, None, options[1], quiet)
    age(out, [1])
    with pytest.raises(DataError, match="Run part 2/2 again"):
        join(out)
    build_part(mixed, out, None, options[1], quiet)
    age(out, [0, 2])
    with pytest.raises(DataError, match="Run part 1/2 again"):
        join(out)
    build_part(mixed, out, None, options[0], quiet)
    assert join(out).quarantined == 1


@pytest.mark.parametrize("again", [(1,), (2,), (2, 1)])
def test_parts_that_run_again_are_joined_with_the_others(
    mixed: Path, whole: dict[str, str], tmp_path: Path, again: tuple[int, ...]
) -> None:
    out = tmp_path / "out"
    for number in (1, 2, *again):
        build_part(mixed, out, None, replace(SEVEN, drop_duplicates="exact", part=(number, 2)), quiet)
        if number == 2:
            (partial_of(out) / "shard-000002.json").unlink(missing_ok=True)  # it was stopped before its last shard
    build_part(mixed, out, None, replace(SEVEN, drop_duplicates="exact", part=(1, 2)), quiet)
    join(out)
    assert digests(out) == whole


def test_tasks_that_start_together_delete_the_same_shards(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build_part(mixed, out, None, SEVEN, quiet)
    real = Path.unlink

    def late(path: Path, missing_ok: bool = False) -> None:
        real(path, missing_ok=True)  # the other task was faster
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", late)
    build_part(mixed, out, None, replace(SEVEN, shard_size="11"), quiet)
    monkeypatch.undo()
    assert len(list(partial_of(out).glob("*.tar"))) == 2


@pytest.mark.parametrize("few", [4, 500], ids=["processes", "threads"])
def test_processes_and_threads_do_not_change_a_byte(
    mixed: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(parts, "_FEW", few)
    monkeypatch.setattr(parts, "_THREADS", 1)
    seen: list[tuple[int, int]] = []
    options = replace(SEVEN, drop_duplicates="exact", workers=2)
    build(mixed, tmp_path / "two", options=options, progress=lambda done, total: seen.append((done, total)))
    assert digests(tmp_path / "two") == whole
    assert seen[0] == (0, 21)
    assert seen[-1] == (21, 21)


def test_a_dead_process_ends_the_build_with_advice(
    mixed: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_FEW", 4)
    monkeypatch.setattr(parts, "_THREADS", 1)
    options = replace(SEVEN, drop_duplicates="exact", workers=2)
    with monkeypatch.context() as patch:
        patch.setattr(workers, "_begin", _die)
        with pytest.raises(DataError, match="it goes on where it was"):
            build(mixed, tmp_path / "out", options=options)
    build(mixed, tmp_path / "out", options=replace(options, workers=1))
    assert digests(tmp_path / "out") == whole


def _die(*_: object) -> None:
    os._exit(9)


def test_the_same_pixels_are_kept_once(mixed: Path, whole: dict[str, str], tmp_path: Path) -> None:
    index = Index.open(tmp_path / "whole")
    assert len(index) == 21 - 1 - 3  # damaged; copy of 00; 18 and 19 are 17
    lines = [json.loads(line) for line in (tmp_path / "whole/quarantine.jsonl").read_text().splitlines()]
    twins = [line for line in lines if "the same pixels as" in line["reason"]]
    assert len(twins) == 3
    assert sorted(line.get("path", "") for line in lines if line not in twins) == ["05.jpg"]
    kept = {index.key(i): index.read(i) for i in range(len(index))}
    assert len({sample.image for sample in kept.values()}) == len(kept)
    assert all(line["reason"].removeprefix("the same pixels as ") in kept for line in twins)
    index.verify()


def test_a_copy_in_test_wins_and_a_disagreement_is_named(
    tmp_path: Path, jpeg: Callable[..., bytes], write_table: Callable[..., Path]
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(1))
    rows = [("a", "train", "x"), ("b", "test", "y"), ("c", "train", "")]
    table = write_table(tmp_path / "t.csv", [{"path": n, "split": s, "label": k} for n, s, k in rows])
    index = build(tmp_path, tmp_path / "out", table, BuildOptions(drop_duplicates="exact")).index
    assert [index.read(i).meta["path"] for i in range(len(index))] == ["b.jpg"]
    assert "but labelled x, not y" in (tmp_path / "out/quarantine.jsonl").read_text()


def test_an_audit_says_what_to_leave_out(mixed: Path, tmp_path: Path) -> None:
    index = build(mixed, tmp_path / "first", options=SEVEN).index
    keys = [index.key(i) for i in range(len(index))]
    audit = tmp_path / "audit.json"
    audit.write_text(json.dumps({"format": "hybridssl-audit", "drop": keys[:2], "leaks": keys[4:5], "anything": 1}))
    built = build(mixed, tmp_path / "second", options=replace(SEVEN, drop_duplicates=str(audit)))
    assert {built.index.key(i) for i in range(len(built.index))} == set(keys) - {*keys[:2], keys[4]}
    assert built.dropped == 3
    audit.write_text(json.dumps({"format": "hybridssl-audit", "drop": ["of-another-index"]}))
    with pytest.raises(DataError, match="none of its 1 keys is of these images"):
        build(mixed, tmp_path / "third", options=replace(SEVEN, drop_duplicates=str(audit)))
    audit.write_text("[]")
    with pytest.raises(DataError, match=r"no audit.json"):
        build(mixed, tmp_path / "third", options=replace(SEVEN, drop_duplicates=str(audit)))


def test_parts_from_the_command_line(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    for number in ("1/2", "2/2"):
        assert main(["build", "--images", str(mixed), "--out", out, "--shard-size", "7", "--part", number]) == 0
    assert f"python -m shards index {out} --merge" in capsys.readouterr().out
    assert main(["index", out, "--merge"]) == 0
    assert "1 images cannot be read" in capsys.readouterr().out
    build(mixed, tmp_path / "whole", options=BuildOptions(shard_size="7"))
    assert digests(Path(out)) == digests(tmp_path / "whole")
    assert main(["index", out, "--merge"]) == 2
    assert "add --overwrite" in capsys.readouterr().err
