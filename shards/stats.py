"""What an index holds, in numbers, and what looks wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.errors import DataError
from shards.format import decode
from shards.index import Index


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
    for name, values in (("group", group), ("image", np.asarray(index.column("digest")))):
        pairs = np.unique(np.stack([values, split.astype(np.int64)])[:, (split > 0) & (values != 0)], axis=1)
        crossing = int((np.unique(pairs[0], return_counts=True)[1] > 1).sum())
        if crossing:
            what = "groups (patients) have images" if name == "group" else "images lie, byte for byte,"
            found.append(f"{crossing:,} {what} in more than one split: a test on them is not a test")
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
