"""What an index holds, in numbers, and what looks wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.errors import DataError
from shards.format import decode
from shards.index import Index
from shards.split import crossing

FEW = 10  # images of a class: too few to learn from, or to judge by


@dataclass(frozen=True)
class Stats:
    samples: int
    labelled: int
    groups: int
    masks: int
    texts: int
    bytes: int
    splits: dict[str, int]  # samples in each split that has any; "" is none
    classes: dict[str, dict[str, int]]  # class -> split -> samples (by first label)
    sources: dict[str, dict[str, int]]  # source -> class -> samples; "" is unlabelled
    sides: tuple[int, int, int]  # shortest, median and longest short side of the images looked at, in pixels
    damaged: int  # of the images looked at
    looked_at: int
    quarantined: int | None  # files that the build could not read; None: not known here
    warnings: list[str]


def stats(index: Index, look_at: int = 200) -> Stats:
    """Count an index by its columns; decode `look_at` images, evenly spread, for their size."""
    split, label, source = (np.asarray(index.column(name)) for name in ("split", "label", "source"))
    group = np.asarray(index.column("group"))
    sides, damaged = _sides(index, look_at)
    splits = {name: int((split == i).sum()) for i, name in enumerate(index.splits) if (split == i).any()}
    return Stats(
        samples=len(index),
        labelled=int((label >= 0).sum()),
        groups=len(np.unique(group[group != 0])),
        masks=int((index.column("mask")[:, 1] > 0).sum()),
        texts=int((index.column("txt")[:, 1] > 0).sum()),
        bytes=sum(shard["bytes"] for shard in index.shards),
        splits=splits,
        classes=cross(label, index.classes, split, index.splits),
        sources=cross(source, index.sources, label, (*index.classes, "")),
        sides=sides,
        damaged=damaged,
        looked_at=min(look_at, len(index)),
        quarantined=_quarantined(index),
        warnings=_warnings(index, split, label, group),
    )


def cross(
    a: np.ndarray, a_names: tuple[str, ...], b: np.ndarray, b_names: tuple[str, ...]
) -> dict[str, dict[str, int]]:
    """How often each pair occurs. A number of -1 in `b` counts for its last name; rows of -1 in `a` do not count."""
    table: dict[str, dict[str, int]] = {}
    for i, name in enumerate(a_names):
        counts = np.bincount(b[a == i] % len(b_names), minlength=len(b_names))
        table[name] = {other: int(n) for other, n in zip(b_names, counts, strict=True) if n}
    return table


def _quarantined(index: Index) -> int | None:
    """Lines of quarantine.jsonl that name a file; those that name a key are copies, left out on purpose."""
    if index.remote:
        return None
    try:
        lines = (index.root / "quarantine.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return 0
    return sum(line.startswith(b'{"path"') for line in lines)


def _sides(index: Index, look_at: int) -> tuple[tuple[int, int, int], int]:
    sides, damaged = [], 0
    for i in np.unique(np.linspace(0, len(index) - 1, min(look_at, len(index))).astype(int)):
        try:
            sides.append(min(decode(index.read(int(i)).image, 0, index.channels).shape[:2]))
        except DataError:
            damaged += 1
    return (min(sides), int(np.median(sides)), max(sides)) if sides else (0, 0, 0), damaged


def _warnings(index: Index, split: np.ndarray, label: np.ndarray, group: np.ndarray) -> list[str]:
    found = []
    for what, values in (
        ("groups (patients) have images", group),
        ("images lie, byte for byte,", np.asarray(index.column("digest"))),
    ):
        across = crossing(values, split)
        silent = np.isin(values[split == 0], across).any()
        hint = " (without a split counts as train: pretraining reads both)" if silent else ""
        if len(across):
            found.append(f"{len(across):,} {what} in more than one split{hint}: a test on them is not a test")
    strange = sorted({name for i, name in enumerate(index.splits) if (split == i).any()} - {"", "train", "val", "test"})
    if strange:
        found.append(
            f"pretraining and evaluation know the splits train, val and test, not {', '.join(strange[:5])}"
            f"{' ...' if len(strange) > 5 else ''}"
        )
    if not (label >= 0).any():
        found.append("no label is known: if a column of the table holds them, name it with --label-column")
    elif not (split > 0).any():
        found.append(
            "no image is in a split, so pretraining reads all and none is left to test on: "
            "give the table a split column, or build with --split 70/10/20"
        )
    counts = np.bincount(label[label >= 0], minlength=len(index.classes))
    few = [f"{name} ({n:,})" for name, n in zip(index.classes, counts, strict=True) if 0 < n < FEW]
    if few:
        found.append(f"classes of fewer than {FEW} images: {', '.join(few[:5])}{' ...' if len(few) > 5 else ''}")
    for i, name in enumerate(index.splits):
        if name and (split == i).any():
            there = np.unique(label[(split == i) & (label >= 0)])
            absent = [kind for k, kind in enumerate(index.classes) if k not in there]
            if absent and len(there):
                found.append(
                    f"split {name} has no sample of {', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}"
                )
    if not group.any():
        found.append("no group is known: if several images show one patient, give the table a group column")
    return found
