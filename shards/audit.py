"""What is wrong with a set before a model learns it: audit.json, from one index and, against leaks, from others.

    found = audit(Index.open("data/derm"), [Index.open("data/clinic-test")])
    write(found.document, "audit/audit.json")

`drop` in the document names the redundant copies, `leaks` the samples that an index of --against also holds, with all
their copies; the recipe key `stream.exclude` keeps both out of a run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards import duplicates, hashes, rims
from shards.confounding import confounding
from shards.duplicates import Group, Pairs
from shards.errors import DataError
from shards.index import Index
from shards.looks import Looks, look
from shards.split import crossing
from shards.tallies import columns, tallies

FORMAT, VERSION = "hybridssl-audit", 1
FACTOR = 50  # distinct values that a column may have to be asked whether it predicts the label

Array = np.ndarray
Suggest = Callable[[Index, Index], Array]  # pairs [M, 2] of samples that something else finds alike
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]  # bar("reading") as tick; tick(done, total)


@dataclass(frozen=True)
class Audit:
    """The document of audit.json, and what a page with pictures needs besides."""

    document: dict[str, Any]
    index: Index
    groups: list[Group]
    others: list[tuple[Index, Pairs]]


def audit(
    index: Index,
    against: Sequence[Index] = (),
    suggest: Suggest | None = None,
    bar: Bar = lambda what: nullcontext(lambda done, total: None),
) -> Audit:
    """Look at every image of `index` and of `against`. suggest: features that propose further pairs, which pixels
    judge. bar: shows progress."""
    looks = _look(index, bar)
    pairs = _find((index, looks), None, suggest, bar)
    groups = duplicates.groups(index, looks, pairs)
    others = [(other, _find((index, looks), (other, _look(other, bar)), suggest, bar)) for other in against]
    meta = columns(index)
    copies = [_group(index, group) for group in groups]
    findings = {
        "unreadable": [{"key": index.key(i), "reason": reason} for i, reason in sorted(looks.reasons.items())],
        "constant": _keys(index, looks.constant),
        "too_plain_to_compare": int((looks.readable & ~looks.constant & ~looks.telling).sum()),
        "duplicates": copies,
        "groups_across_splits": groups_across_splits(index),
        "against": [_leaks(index, other, pairs, groups) for other, pairs in others],
        "rims": {kind: _keys(index, looks.rim == n) for n, kind in enumerate(rims.RIMS) if kind},
        "confounding": _confounding(index, looks, meta),
    }
    document = {
        "format": FORMAT,
        "version": VERSION,
        "index": _about(index),
        "against": [_about(other) for other in against],
        "thresholds": {"hash_bits": hashes.FAR, "agreement": hashes.AGREE, "agreement_wide": hashes.AGREE_WIDE},
        "features": suggest is not None,
        "findings": findings,
        "tallies": tallies(index, looks, meta),
        "drop": sorted(key for group in copies for key in group["keys"][1:]),
        "leaks": sorted({index.key(i) for _, pairs in others for i in duplicates.spread(pairs.a, groups)}),
    }
    return Audit(document, index, groups, others)


def _look(index: Index, bar: Bar) -> Looks:
    with bar(f"reading {index.name}") as tick:
        return look(index, tick)


def _find(own: tuple[Index, Looks], other: tuple[Index, Looks] | None, suggest: Suggest | None, bar: Bar) -> Pairs:
    suggested = suggest(own[0], (other or own)[0]) if suggest else None
    with bar(f"comparing with {(other or own)[0].name}") as tick:
        return duplicates.find(own, other, suggested, tick)


def begin(path: Path) -> None:
    """Make the folder of an audit.json to be. DataError when something else lies there."""
    if path.exists() and not _is_audit(path):
        raise DataError(f"{path} is there and no audit: choose another --out, nothing was touched")
    path.parent.mkdir(parents=True, exist_ok=True)


def write(document: dict[str, Any], path: Path) -> None:
    """Write audit.json in one piece. DataError when something else lies there."""
    begin(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def excluded(path: str | Path, index: Index) -> Array:
    """int64 numbers of the samples of `index` that an audit.json says to leave out: redundant copies and leaks.

    Of a mix, those of the set that was audited. DataError when the file is no audit, or was made of another index than
    this one: its keys might name other images.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        if document["format"] != FORMAT or document["version"] > VERSION:
            raise ValueError("its format is another, or newer than this program")
        made_of, keys = document["index"], {*document["drop"], *document["leaks"]}
        sets = {member.sha256: (member, first) for member, first in zip(index.members, index.bounds, strict=False)}
        same = sets.get(made_of["sha256"])
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): make it with `python -m shards audit`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no audit.json ({error}): make it with `python -m shards audit`") from None
    if not same:
        raise DataError(
            f"{path} was made of another index ({made_of['name']}, {made_of['samples']:,} samples) than {index} "
            f"is now: run `python -m shards audit DIR --out {Path(path).parent}` again"
        )
    member, first = same
    return np.array([first + i for i in range(len(member)) if member.key(i) in keys], dtype=np.int64)


def _is_audit(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _about(index: Index) -> dict[str, Any]:
    return {
        "name": index.name,
        "sha256": index.sha256,
        "samples": len(index),
        "synthetic": index.synthetic,
    }


def _keys(index: Index, mask: Array) -> list[str]:
    return [index.key(int(i)) for i in np.flatnonzero(mask)]


def _split(index: Index, i: int) -> str:
    return index.splits[int(index.column("split")[i])]


def _group(index: Index, group: Group) -> dict[str, Any]:
    """A group of copies for JSON; its first key is the one to keep."""
    splits = [_split(index, i) for i in group.rows]
    return {
        "keys": [index.key(i) for i in group.rows],
        "how": group.how,
        "agreement": round(group.agreement, 3),
        "splits": splits,
        "labels": [list(index.labels(i)) for i in group.rows],
        "across_splits": len({split or "train" for split in splits}) > 1,
        "label_conflict": conflict(index, group.rows),
    }


def conflict(index: Index, rows: Sequence[int]) -> bool:
    """Do copies carry labels that exclude each other? A label that the other's source cannot name excludes nothing."""
    source = index.column("source")
    known = [(set(index.labels(i)), index.sources[int(source[i])] if source[i] >= 0 else "") for i in rows]
    known = [(labels, name) for labels, name in known if labels]
    return any(
        (a - b) & set(index.vocabulary.get(there, index.classes)) for a, _ in known for b, there in known if a != b
    )


def groups_across_splits(index: Index) -> list[dict[str, list[str]]]:
    """{split: keys} of every patient or lesion with images in more than one split; "" counts as train (split.py)."""
    group = np.asarray(index.column("group"))
    found = []
    for value in crossing(group, np.asarray(index.column("split"))):
        by_split: dict[str, list[str]] = {}
        for i in np.flatnonzero(group == value).tolist():
            by_split.setdefault(_split(index, i), []).append(index.key(i))
        found.append(by_split)
    return found


def _leaks(index: Index, other: Index, pairs: Pairs, groups: list[Group]) -> dict[str, Any]:
    """What the other index holds too, for JSON. `samples` counts the copies within the set as well."""
    rows = zip(pairs.a.tolist(), pairs.b.tolist(), pairs.how, pairs.agreement.tolist(), strict=True)
    return {
        "index": other.name,
        "samples": len(duplicates.spread(pairs.a, groups)),
        "other_samples": len(set(pairs.b.tolist())),
        "pairs": [
            {
                "key": index.key(a),
                "split": _split(index, a),
                "other": other.key(b),
                "other_split": _split(other, b),
                "how": how,
                "agreement": round(agreement, 3),
            }
            for a, b, how, agreement in rows
        ],
    }


def _confounding(index: Index, looks: Looks, meta: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Every factor that has 2 to FACTOR values, the one that tells most first."""
    label, group = (np.asarray(index.column(name)) for name in ("label", "group"))
    sizes = looks.size.astype(np.int64) @ np.array([1 << 20, 1])
    factors: dict[str, Array] = {
        "source": np.asarray(index.column("source")),
        "rim": np.where(looks.readable, looks.rim, -1),
        "image size": np.where(looks.readable, sizes, -1),
    }
    for name, values in meta.items():
        numbers = {value: n for n, value in enumerate(dict.fromkeys(value for value in values if value))}
        factors[name] = np.array([numbers.get(value, -1) for value in values])
    few = {name: values for name, values in factors.items() if 2 <= len(np.unique(values[values >= 0])) <= FACTOR}
    found = [confounding(name, values, label, group, tests=len(few)) for name, values in few.items()]
    judged = sorted((f for f in found if f), key=lambda f: f.by_chance_95 - f.balanced_accuracy)
    return [asdict(f) | {"shown": f.p * len(judged) <= 0.05} for f in judged]
