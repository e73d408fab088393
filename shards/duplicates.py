"""Which pictures are there more than once: the same bytes, the same pixels, or the same picture changed a little."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from shards import hashes
from shards.index import Index
from shards.looks import Looks

PART = 500  # suggestions that a thread judges at a time
BYTES, PIXELS, NEAR = "bytes", "pixels", "near"  # how a pair was found, the surest first

Array = np.ndarray


@dataclass(frozen=True)
class Pairs:
    """Rows of one set and of another (or of the same) that show one picture."""

    a: Array  # int64 [P]
    b: Array  # int64 [P]
    how: list[str]  # BYTES | PIXELS | NEAR
    agreement: Array  # float [P]: correlation of details, 1 for BYTES and PIXELS

    def __len__(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class Group:
    """Pictures of one set that are one picture."""

    rows: tuple[int, ...]  # the one to keep first
    how: str  # the least sure of its pairs
    agreement: float  # the lowest of its pairs


def find(
    own: tuple[Index, Looks],
    other: tuple[Index, Looks] | None = None,
    suggested: Array | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pairs:
    """All pairs between two sets, or (other None) within one, each once and by the surest way.

    suggested: int64 [M, 2] rows that somebody else (features) finds alike; they are laid over each other in every
    orientation and down to crops of 60 % of a side.
    """
    itself = other is None
    (index_a, a), (index_b, b) = own, other or own
    found: dict[tuple[int, int], tuple[str, float]] = {}

    def add(rows: Array, how: str, scores: Array | None = None) -> None:
        for n, (x, y) in enumerate(rows.tolist()):
            key = (min(x, y), max(x, y)) if itself else (x, y)
            if not itself or x != y:
                found.setdefault(key, (how, 1.0 if scores is None else float(scores[n])))

    add(_equal(np.asarray(index_a.column("digest")), np.asarray(index_b.column("digest")), itself), BYTES)
    add(_equal(np.where(a.readable, a.pixels, 0), np.where(b.readable, b.pixels, 0), itself), PIXELS)
    for rows, scores in (_by_hash(a, b, itself, progress), _by_suggestion(a, b, suggested, progress)):
        add(rows, NEAR, scores)
    order = sorted(found)
    at = np.array(order, dtype=np.int64).reshape(-1, 2)
    return Pairs(at[:, 0], at[:, 1], [found[k][0] for k in order], np.array([found[k][1] for k in order]))


def _equal(a: Array, b: Array, itself: bool) -> Array:
    """int64 [P, 2]: rows of equal value, 0 left out; within one set, each row with the first that has its value."""
    values, first, inverse = np.unique(b, return_index=True, return_inverse=True)
    if itself:
        rows = np.stack([first[inverse], np.arange(len(a))], axis=1)
        return rows[(rows[:, 0] != rows[:, 1]) & (a != 0)]
    at = np.minimum(np.searchsorted(values, a), len(values) - 1)
    same = (values[at] == a) & (a != 0)
    return np.stack([np.flatnonzero(same), first[at[same]]], axis=1)


def _by_hash(a: Looks, b: Looks, itself: bool, progress: Callable[[int, int], None]) -> tuple[Array, Array]:
    """Pairs whose hashes are near and whose pixels agree: rows [P, 2] and agreement [P], the best first."""
    rows, scores = _inside(a, b, itself, progress)
    if not itself:  # the crop may lie on either side
        back, more = _inside(b, a, False, progress)
        rows, scores = np.concatenate([rows, back[:, ::-1]]), np.concatenate([scores, more])
    order = np.argsort(-scores, kind="stable")
    return rows[order], scores[order]


def _inside(outer: Looks, inner: Looks, itself: bool, progress: Callable[[int, int], None]) -> tuple[Array, Array]:
    """Pairs where the second picture is the first, or a part of it."""
    rows_a, rows_b = _once(outer), _once(inner)
    thumbs_a, thumbs_b = outer.thumbs[rows_a], inner.thumbs[rows_b]
    pairs = hashes.propose(thumbs_a, hashes.hashes(thumbs_b), itself, progress)
    fine_a = _Details(thumbs_a)
    fine_b = fine_a if itself else _Details(thumbs_b)
    scores = [hashes.agreement(hashes.turned(fine_a[x], turn), fine_b[y]) for x, y, turn in pairs.tolist()]
    good = np.array(scores, dtype=float) >= hashes.AGREE
    return np.stack([rows_a[pairs[good, 0]], rows_b[pairs[good, 1]]], axis=1), np.array(scores, dtype=float)[good]


def _by_suggestion(
    a: Looks, b: Looks, suggested: Array | None, progress: Callable[[int, int], None]
) -> tuple[Array, Array]:
    """Pairs that somebody else finds alike and whose pixels agree: rows [P, 2] and agreement [P]."""
    if suggested is None or not len(suggested):
        return np.empty((0, 2), np.int64), np.empty(0)
    rows = suggested[a.telling[suggested[:, 0]] & b.telling[suggested[:, 1]]]
    parts = np.array_split(rows, range(PART, len(rows), PART))

    def judge(part: Array) -> list[float]:
        return [hashes.agreement_any_way(a.thumbs[x], b.thumbs[y]) for x, y in part.tolist()]

    scores = np.empty(0)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # OpenCV lets go of Python's lock
        for part in pool.map(judge, parts):
            scores = np.append(scores, part)
            progress(len(scores), len(rows))
    good = scores >= hashes.AGREE_WIDE
    return rows[good], scores[good]


class _Details:
    """Details of thumbnails, computed where they are asked for: only proposals are, a small share."""

    def __init__(self, thumbs: Array) -> None:
        self.thumbs, self.known = thumbs, {}

    def __getitem__(self, row: int) -> Array:
        if row not in self.known:
            if len(self.known) > 10_000:
                self.known.clear()
            self.known[row] = hashes.details(self.thumbs[row])
        return self.known[row]


def _once(looks: Looks) -> Array:
    """Rows to compare: of equal pixels only the first, which is enough to join their copies."""
    rows = np.flatnonzero(looks.telling)
    return np.sort(rows[np.unique(looks.pixels[rows], return_index=True)[1]])


def groups(index: Index, looks: Looks, pairs: Pairs) -> list[Group]:
    """Pictures that pairs join, directly or through others. The one to keep stands first: that of the evaluation splits
    (so that a copy in train is what goes), then with most labels, then with most pixels, then by key."""
    count = len(index)
    graph = coo_array((np.ones(len(pairs)), (pairs.a, pairs.b)), shape=(count, count))
    component = connected_components(graph, directed=False)[1]
    members: dict[int, list[int]] = {}
    for row in np.unique(np.concatenate([pairs.a, pairs.b])).tolist():
        members.setdefault(int(component[row]), []).append(row)
    sure = (BYTES, PIXELS, NEAR)
    least: dict[int, tuple[int, float]] = {}
    for a, how, agreement in zip(pairs.a.tolist(), pairs.how, pairs.agreement.tolist(), strict=True):
        old = least.get(int(component[a]), (0, 1.0))
        least[int(component[a])] = max(old[0], sure.index(how)), min(old[1], agreement)

    def rank(row: int) -> tuple[int, int, int, str]:
        split = index.splits[int(index.column("split")[row])]
        pixels = int(np.prod(looks.size[row], dtype=np.int64))
        return (split in ("", "train")) + (split != "test"), -len(index.labels(row)), -pixels, index.key(row)

    return [Group(tuple(sorted(rows, key=rank)), sure[least[c][0]], least[c][1]) for c, rows in members.items()]


def spread(rows: Array, groups: list[Group]) -> set[int]:
    """The rows and all that are one picture with any of them: of equal pixels `find` compares only the first."""
    found = set(rows.tolist())
    return found.union(*(group.rows for group in groups if not found.isdisjoint(group.rows)))
