"""From a place in a sequence to a sample, as pure functions: epochs of one set, rounds over classes, and shares.

`stream.Order` puts them together. Places are integers and all arithmetic on them is exact, so any place is found
without those before it. Permutations are drawn for a window or a part at a time: a set may have ten million samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np

# Numbers of labelled slots' epochs start here, apart from those of the plain order, so no batch shows a crop twice.
LABELLED_EPOCH = 1 << 20
PART = 1 << 16  # samples of a class that are shuffled at a time


def permutation(n: int, *seed: int) -> np.ndarray:
    """A permutation of range(n) from integers, the same in every version of numpy: raw words are."""
    words = np.random.Philox(np.random.SeedSequence(seed)).random_raw(n)
    return np.argsort(words, kind="stable")


class Recent(dict):
    """The last few values of a slow function. Sent to another process, it arrives empty."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, (self.most,)

    def of(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key in self:
            self[key] = self.pop(key)  # the last used comes last
        else:
            while len(self) >= self.most:
                del self[next(iter(self))]
            self[key] = make()
        return self[key]


class Shares:
    """Parts places between sequences by weight: `shares(place)` -> (which, the place in it).

    Sequence i gets the share w_i, spread as evenly as whole numbers allow: of the places that those before it left, p
    is its own iff floor((p + 1) f) > floor(p f), with f its share of what is left. So an aligned block of n places
    holds exactly n w_i of each wherever all of these are whole.
    """

    def __init__(self, weights: Sequence[Fraction]):
        left = list(accumulate(reversed(weights)))[::-1]  # of the weights, before each sequence has taken its own
        self._parts = [weight / rest if rest else Fraction(0) for weight, rest in zip(weights, left, strict=True)]

    def __call__(self, place: int) -> tuple[int, int]:
        for which, share in enumerate(self._parts):
            before = place * share.numerator // share.denominator
            if (place + 1) * share.numerator // share.denominator > before:
                return which, before
            place -= before
        raise AssertionError("the last sequence takes every place that is left")


class Epochs:
    """Every one of `numbers` once an epoch: `epochs(place)` -> (epoch, number).

    The shards are shuffled each epoch, then the samples inside every `window` shards, so that a reader has few shards
    at hand at a time. `numbers` is sorted; `starts` says where each shard starts.
    """

    def __init__(self, numbers: np.ndarray, starts: np.ndarray, window: int, seed: int):
        self.numbers, self.window, self.seed = numbers, window, seed
        bounds = np.searchsorted(numbers, starts.astype(numbers.dtype))  # of one type, or numpy copies all numbers
        self._shards = np.flatnonzero(np.diff(bounds))  # those that hold any of the numbers
        self._spans = np.stack([bounds[self._shards], bounds[self._shards + 1]], axis=1)  # [shards, 2] into `numbers`
        self._orders, self._windows = Recent(2), Recent(4)

    def __len__(self) -> int:
        return len(self.numbers)

    def __call__(self, place: int) -> tuple[int, int]:
        epoch, window, at = self._find(place)
        return epoch, int(self._windows.of((epoch, window), lambda: self._shuffled(epoch, window))[at])

    def shards(self, place: int) -> list[int]:
        """The shards that this place and those soon after it are read from: of its window and of the next."""
        epoch, window, _ = self._find(place)
        after = (epoch, window + 1) if window + 1 < len(self._order(epoch)[1]) else (epoch + 1, 0)
        rows = [*self._rows(epoch, window), *self._rows(*after)]
        return self._shards[list(dict.fromkeys(rows))].tolist()

    def _find(self, place: int) -> tuple[int, int, int]:
        """Epoch, window and the place in the window."""
        epoch, place = divmod(place, len(self))
        ends = self._order(epoch)[1]
        window = bisect_right(ends, place)
        return epoch, window, place - (ends[window - 1] if window else 0)

    def _order(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """The shards of an epoch (rows of `_spans`) in their order, and where each window ends."""

        def draw() -> tuple[np.ndarray, list[int]]:
            rows = permutation(len(self._spans), self.seed, 0, epoch)
            counts = np.diff(self._spans[rows], axis=1)[:, 0]
            return rows, np.cumsum(np.add.reduceat(counts, np.arange(0, len(counts), self.window))).tolist()

        return self._orders.of(epoch, draw)

    def _rows(self, epoch: int, window: int) -> np.ndarray:
        return self._order(epoch)[0][window * self.window : (window + 1) * self.window]

    def _shuffled(self, epoch: int, window: int) -> np.ndarray:
        numbers = np.concatenate([self.numbers[a:b] for a, b in self._spans[self._rows(epoch, window)]])
        return numbers[permutation(len(numbers), self.seed, 1, epoch, window)]


class Rounds:
    """Labelled samples, class by class: `rounds(place)` -> (epoch, number).

    Each round visits every class once, in shuffled order, and each class runs its own shuffled epochs. A class of more
    than `PART` samples is shuffled part by part, where a part is every n-th of its samples.
    """

    def __init__(self, numbers: np.ndarray, labels: np.ndarray, seed: int):
        """`labels`: the class of each of `numbers`, or -1, which is left out."""
        self.seed = seed
        numbers, labels = numbers[labels >= 0], labels[labels >= 0]
        small = labels.astype(np.int16) if labels.max(initial=0) < 1 << 15 else labels  # numpy sorts int16 in one pass
        counts = np.bincount(labels) if len(labels) else np.zeros(0, np.int64)
        ends = np.cumsum(counts[counts > 0])[:-1]
        by_class = numbers[np.argsort(small, kind="stable")]
        self.classes = np.split(by_class, ends) if len(numbers) else []
        self._rounds, self._parts = Recent(2), Recent(len(self.classes) + 1)

    def __call__(self, place: int) -> tuple[int, int]:
        seen, at = divmod(place, len(self.classes))
        kind = int(self._rounds.of(seen, lambda: permutation(len(self.classes), self.seed, 2, seen))[at])
        numbers = self.classes[kind]
        epoch, step = divmod(seen, len(numbers))
        parts = -(-len(numbers) // PART)
        short, long = divmod(len(numbers), parts)  # the first `long` parts have one sample more than `short`
        part, step = divmod(step, short + 1) if step < long * (short + 1) else divmod(step - long, short)
        return LABELLED_EPOCH + epoch, int(self._part(kind, epoch, part, parts)[step])

    def _part(self, kind: int, epoch: int, part: int, parts: int) -> np.ndarray:
        def draw() -> np.ndarray:
            numbers = self.classes[kind][part::parts]
            return numbers[permutation(len(numbers), self.seed, 3, kind, epoch, *([part] if part else []))]

        return self._parts.of((kind, epoch, part), draw)
