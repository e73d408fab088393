"""Several indexes as one: their samples one after another, their classes, sources and splits as unions.

A `Mix` offers what an `Index` does, so whoever reads one reads the other. How often each set is drawn is the order's
business (`StreamOptions.shares`).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.errors import DataError
from shards.format import SPLITS, Sample
from shards.index import Index

if TYPE_CHECKING:
    from shards.cache import Cache

DEFAULT = "default"  # the source of labelled samples for which nobody named one (scan.py)


def open_sets(roots: str | Path | Sequence[str], cache: Cache | None = None) -> Index:
    """The index at a folder or an address, or the mix of several. DataError says what is wrong with which."""
    names = [roots] if isinstance(roots, str | Path) else list(roots)
    indexes = [Index.open(name, cache) for name in names]
    return indexes[0] if len(indexes) == 1 else Mix(indexes)


class Mix(Index):
    """Samples of several indexes under one numbering.

    Raises DataError for two sets that do not go together: the same set twice, different channels, or one source name
    for what cannot be one source (their lists of classes contradict each other).
    """

    def __init__(self, members: Sequence[Index]):
        self._members = list(members)
        _check(self._members)
        first = self.members[0]
        self.root = next((m.root for m in self.members if (m.root / "classes.csv").is_file()), first.root)
        self.sha256 = sha256(json.dumps([member.sha256 for member in self.members]).encode()).hexdigest()
        self.channels, self.synthetic = first.channels, any(member.synthetic for member in self.members)
        self.remote = next((member.remote for member in self.members if member.remote), None)
        names = {source for member in self.members for source in member.sources}
        self.sources: tuple[str, ...] = tuple(sorted(names))
        self.vocabulary = {
            source: _union(m.vocabulary.get(source, ()) for m in self.members) for source in self.sources
        }
        self.classes: tuple[str, ...] = tuple(_union(member.classes for member in self.members))
        others = _union(member.splits for member in self.members)
        self.splits = (*SPLITS, *(name for name in others if name not in SPLITS))
        self.shards = [shard for member in self.members for shard in member.shards]
        self._bounds = [0, *accumulate(len(member) for member in self.members)]
        pairs = zip(self.members, self.bounds, strict=False)
        self.starts = np.concatenate([*(member.starts[:-1] + first for member, first in pairs), self.bounds[-1:]])
        self._joined: dict[str, np.ndarray] = {}

    @property
    def members(self) -> list[Index]:
        return self._members

    @property
    def bounds(self) -> list[int]:
        return self._bounds

    def __str__(self) -> str:
        return " + ".join(map(str, self.members))

    @property
    def name(self) -> str:
        return " + ".join(member.name for member in self.members)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_joined": {}}

    def column(self, name: str) -> np.ndarray:
        """One column of all sets, in memory; classes, sources and splits by the numbers that they have here."""
        if name not in self._joined:
            own = {"label": "classes", "source": "sources", "split": "splits"}.get(name)
            parts = [member.column(name) for member in self.members]
            if own:
                parts = [self._renumber(own, *pair) for pair in zip(self.members, parts, strict=True)]
            self._joined[name] = np.concatenate(parts)
        return self._joined[name]

    def _renumber(self, names: str, member: Index, numbers: np.ndarray) -> np.ndarray:
        ours = {name: i for i, name in enumerate(getattr(self, names))}
        table = np.array([*(ours[name] for name in getattr(member, names)), -1])  # -1, the last one: none
        return table.astype(numbers.dtype)[numbers]

    def key(self, i: int) -> str:
        member, own = self._find(i)
        return member.key(own)

    def shard_of(self, i: int) -> tuple[str, int]:
        """The shard with the folder or address of its set, and the byte at which the image starts in it."""
        member, own = self._find(i)
        name, offset = member.shard_of(own)
        return f"{member}/{name}", offset

    def read(self, i: int) -> Sample:
        member, own = self._find(i)
        return member.read(own)

    def meta(self, i: int) -> dict[str, Any]:
        member, own = self._find(i)
        return member.meta(own)

    def labels(self, i: int) -> tuple[str, ...]:
        member, own = self._find(i)
        return member.labels(own)

    def verify(self) -> None:
        for member in self.members:
            member.verify()

    def ahead(self, shards: Sequence[int]) -> None:
        """Fetch these shards in the background, where they are not on this machine."""
        first = 0
        for member in self.members:
            own = [number - first for number in shards if first <= number < first + len(member.shards)]
            if own:
                member.ahead(own)
            first += len(member.shards)

    def _find(self, i: int) -> tuple[Index, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        which = bisect_right(self.bounds, i) - 1
        return self.members[which], i - self.bounds[which]


def _union(lists: Any) -> list[str]:
    return sorted({name for names in lists for name in names})


def _check(members: list[Index]) -> None:
    for i, later in enumerate(members):
        for earlier in members[:i]:
            both = f"{earlier} and {later}"
            if later.sha256 == earlier.sha256:
                raise DataError(f"{both} are the same set: name it once, and give it a larger stream.weights")
            if later.channels != earlier.channels:
                raise DataError(
                    f"{both} have images of {earlier.channels} and {later.channels} channels: index one of them again "
                    "with the --channels of the other"
                )
            for source in sorted({*earlier.sources} & {*later.sources}):
                a, b = (set(member.vocabulary[source]) for member in (earlier, later))
                if not (a <= b or b <= a or (source != DEFAULT and a & b)):
                    raise DataError(
                        f"{both} both have a source {source!r}, but its classes are {_few(a)} in the one and {_few(b)} "
                        "in the other, and what a source can name decides what its unlabelled classes mean: give one "
                        "of them another name (the source column of the table, or --source)"
                    )


def _few(names: set[str]) -> str:
    return ", ".join(sorted(names)[:4]) + (" ..." if len(names) > 4 else "")
