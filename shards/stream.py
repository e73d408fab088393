"""The order of a training run as a function: position -> (epoch, sample). No process, no state, one integer to resume.

Nothing here needs torch: `SampleDataset` is a map-style dataset over positions and `Positions` its batch sampler, so
`torch.utils.data.DataLoader(dataset, batch_sampler=positions, ...)` keeps the order for any number of workers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.errors import DataError
from shards.format import Sample, decode
from shards.index import Index

if TYPE_CHECKING:
    from torch.utils.data import Dataset, Sampler
else:  # torch finds both by their methods; importing it would cost every door two seconds
    Dataset = Sampler = object

# A sample's crops are drawn from (seed, epoch, number). These offsets keep the epochs of labelled slots, and of
# stand-ins for damaged samples, apart from those of the plain order, so no batch shows the same crops twice.
LABELLED_EPOCH = 1 << 20
STAND_IN_EPOCH = 1 << 40
MAX_STAND_INS = 32

Transform = Callable[[Sample, np.ndarray, int, int, int], Any]  # sample, image, position, epoch, sample number


@dataclass(frozen=True)
class StreamOptions:
    """How samples are drawn."""

    window: int = 8  # shards whose samples are mixed; more mixes better and touches more files at a time
    labelled_fraction: float = 0.0  # share of every batch drawn from labelled samples, class-balanced; 0: as they come
    max_bad_fraction: float = 0.01  # share of damaged samples at which a run stops
    exclude: str = ""  # audit.json of the set (`python -m shards audit`): its redundant copies and leaks stay out

    def __post_init__(self) -> None:
        if self.window < 1:
            raise DataError(f"window is {self.window}; it counts shards and must be 1 or more")
        for name in ("labelled_fraction", "max_bad_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} is {getattr(self, name)}; it is a share and must lie in 0..1")


def permutation(n: int, *seed: int) -> np.ndarray:
    """A permutation of range(n) from integers, the same in every version of numpy: raw words are."""
    words = np.random.Philox(np.random.SeedSequence(seed)).random_raw(n)
    return np.argsort(words, kind="stable")


class Order:
    """`order(position)` -> (epoch, sample number), a pure function of index, selection, options and seed.

    The plain order shuffles the shards each epoch, then the samples inside every `window` shards. With
    `labelled_fraction` f, position p is a labelled slot iff floor((p + 1) f) > floor(p f), so every aligned block of n
    positions has exactly n f of them; the labelled slots walk shuffled rounds over the classes, and each class its
    own shuffled epochs. A sample of several labels counts for its first. The other slots run the plain order.
    """

    def __init__(self, index: Index, selected: np.ndarray, options: StreamOptions, seed: int = 0):
        if seed < 0:
            raise DataError(f"seed is {seed}; it must be 0 or more")
        self.options, self.seed = options, seed
        self.selected = np.unique(np.asarray(selected, dtype=np.int64))  # sorted, so also in shard order
        if not len(self.selected):
            raise DataError(f"no sample of {index.root} is selected, so there is nothing to stream")
        if self.selected[0] < 0 or self.selected[-1] >= len(index):
            raise DataError(f"selected samples reach {self.selected[-1]:,} where {index.root} has {len(index):,}")
        bounds = np.searchsorted(self.selected, index.starts)
        full = np.flatnonzero(np.diff(bounds))
        self._spans = np.stack([bounds[full], bounds[full + 1]], axis=1)  # [shards, 2] into `selected`
        share = Fraction(options.labelled_fraction).limit_denominator(1_000_000)
        self._up, self._down = share.numerator, share.denominator
        self._classes = self._by_class(index) if self._up else []
        self._forget()

    def _by_class(self, index: Index) -> list[np.ndarray]:
        labels = np.asarray(index.column("label")[self.selected])
        order = np.argsort(labels, kind="stable")
        _, first = np.unique(labels[order], return_index=True)
        groups = np.split(self.selected[order], first[1:])
        if labels[order[0]] < 0:
            groups = groups[1:]
        if not groups:
            raise DataError(
                f"labelled_fraction is {self.options.labelled_fraction}, but no selected sample of {index.root} "
                "has a label: set it to 0, or give the table a label column"
            )
        return groups

    def __len__(self) -> int:
        """Samples an epoch of the plain order."""
        return len(self.selected)

    def __call__(self, position: int) -> tuple[int, int]:
        if position < 0:
            raise IndexError(f"position {position} is negative")
        labelled = self.labelled_before(position)
        if self.labelled_before(position + 1) > labelled:
            return self._labelled(labelled)
        return self._plain(position - labelled)

    def labelled_before(self, position: int) -> int:
        """How many of the first `position` positions are labelled slots."""
        return position * self._up // self._down

    def epochs(self, position: int) -> float:
        """How often the plain order has gone through the selection before `position`."""
        return (position - self.labelled_before(position)) / len(self)

    def _plain(self, place: int) -> tuple[int, int]:
        epoch, place = divmod(place, len(self))
        shards, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends, place, side="right"))
        start = int(ends[window - 1]) if window else 0
        return epoch, int(self._window(epoch, window, shards)[place - start])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in their order, and where each window ends."""
        if epoch not in self._epochs:
            if len(self._epochs) >= 2:
                self._epochs.clear()
            shards = permutation(len(self._spans), self.seed, 0, epoch)
            counts = np.diff(self._spans[shards], axis=1)[:, 0]
            ends = np.cumsum(np.add.reduceat(counts, np.arange(0, len(counts), self.options.window)))
            self._epochs[epoch] = shards, ends
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int, shards: np.ndarray) -> np.ndarray:
        """The samples of one window, shuffled."""
        if (epoch, window) not in self._windows:
            if len(self._windows) >= 4:
                self._windows.clear()
            mine = shards[window * self.options.window : (window + 1) * self.options.window]
            numbers = np.concatenate([self.selected[a:b] for a, b in self._spans[mine]])
            self._windows[epoch, window] = numbers[permutation(len(numbers), self.seed, 1, epoch, window)]
        return self._windows[epoch, window]

    def _labelled(self, slot: int) -> tuple[int, int]:
        """Slot j of the labelled ones: its class by rounds over the classes, its sample by epochs of that class."""
        count, (seen, place) = len(self._classes), divmod(slot, len(self._classes))
        if self._round[0] != seen:
            self._round = seen, permutation(count, self.seed, 2, seen)
        kind = int(self._round[1][place])
        numbers = self._classes[kind]
        epoch, step = divmod(seen, len(numbers))
        if kind not in self._class_epochs or self._class_epochs[kind][0] != epoch:
            self._class_epochs[kind] = epoch, numbers[permutation(len(numbers), self.seed, 3, kind, epoch)]
        return LABELLED_EPOCH + epoch, int(self._class_epochs[kind][1][step])

    def _forget(self) -> None:
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}
        self._class_epochs: dict[int, tuple[int, np.ndarray]] = {}
        self._round: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_epochs", "_windows", "_class_epochs", "_round")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class SampleDataset(Dataset):
    """`dataset[position]` -> (transform(sample, image, position, epoch, number), bad).

    `image` is uint8 [H, W, C], a JPEG decoded to a short side of at least `at_least` (0: full). A sample that cannot
    be read is replaced by that of the following position, under an epoch of its own; `bad` names what was left out, as
    dicts of `key`, `shard` and `reason`. DataError after 32 in a row.
    """

    def __init__(self, index: Index, order: Order, transform: Transform, at_least: int = 0):
        self.index, self.order, self.transform, self.at_least = index, order, transform, at_least

    def __getitem__(self, position: int) -> tuple[Any, list[dict[str, str]]]:
        bad: list[dict[str, str]] = []
        for attempt in range(MAX_STAND_INS):
            epoch, number = self.order(position + attempt)
            try:
                sample = self.index.read(number)
                image = decode(sample.image, self.at_least, self.index.channels)
            except DataError as error:
                shard = self.index.shard_of(number)[0]
                bad.append({"key": self.index.key(number), "shard": shard, "reason": str(error)})
                continue
            epoch += attempt * STAND_IN_EPOCH
            return self.transform(sample, image, position, epoch, number), bad
        last = bad[-1]
        raise DataError(
            f"{MAX_STAND_INS} samples in a row cannot be read, the last {last['key']} in {last['shard']}: "
            f"{last['reason']}. Check the folder with `python -m shards stats {self.index.root} --verify`"
        )


class Positions(Sampler):
    """An endless torch batch sampler: step s holds positions [start + s * size, + size).

    Rank r takes the contiguous block r of each step and yields it in micro-batches of `micro`. (Contiguous, so
    that neighbouring positions stay together for any number of ranks.)
    """

    def __init__(self, size: int, start: int = 0, rank: int = 0, world: int = 1, micro: int | None = None):
        self.size, self.start, self.rank, self.world = size, start, rank, world
        if min(size, world) < 1 or start < 0 or not 0 <= rank < world:
            raise ValueError(f"size {size}, start {start}, rank {rank}, world {world} describe no batch")
        if size % world:
            raise ValueError(f"a batch of {size} does not divide over {world} processes: choose a multiple of {world}")
        self.micro = size // world if micro is None else micro
        if self.micro < 1 or (size // world) % self.micro:
            raise ValueError(
                f"the {size // world} images a process of each batch do not divide into micro-batches of {self.micro}"
            )

    def __iter__(self) -> Iterator[list[int]]:
        block = self.size // self.world
        at = self.start + self.rank * block
        while True:
            for first in range(at, at + block, self.micro):
                yield list(range(first, first + self.micro))
            at += self.size


class Quarantine:
    """Writes what could not be read to `quarantine.jsonl`, once each, and stops a run when it is too much."""

    def __init__(self, path: str | Path, options: StreamOptions, samples: int):
        """`samples`: how many an epoch has, `len(order)`."""
        self.path, self.limit, self.samples = Path(path), options.max_bad_fraction, samples
        self.known: set[str] = set()
        if self.path.is_file():  # a resumed run goes on where it was
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.known = {line for line in lines if line}

    def add(self, bad: list[dict[str, str]], seen: int) -> None:
        """`bad` as the dataset reports it, `seen`: images read so far. DataError above `max_bad_fraction`."""
        lines = [json.dumps(entry, ensure_ascii=False) for entry in bad]
        new = [line for line in dict.fromkeys(lines) if line not in self.known]
        if new:
            self.known.update(new)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in new))
        allowed = max(1.0, self.limit * min(self.samples, max(seen, 1000)))  # one alone never stops a run
        if len(self.known) > allowed:
            raise DataError(
                f"{len(self.known):,} damaged samples after {seen:,} images are more than max_bad_fraction "
                f"({self.limit}) allows: see {self.path}, mend or remove them, and build or index the folder again"
            )
