"""The order of a training run as a function: position -> (epoch, sample). No process, no state, one integer to resume.

Nothing here needs torch: `SampleDataset` is a map-style dataset over positions and `Positions` its batch sampler, so
`torch.utils.data.DataLoader(dataset, batch_sampler=positions, ...)` keeps the order for any number of workers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.errors import DataError, FetchError
from shards.format import Sample, decode
from shards.index import Index
from shards.order import Epochs, Rounds, Shares

if TYPE_CHECKING:
    from torch.utils.data import Dataset, Sampler
else:  # torch finds both by their methods; importing it would cost every door two seconds
    Dataset = Sampler = object

STAND_IN_EPOCH = 1 << 40  # keeps the crops of a stand-in for a damaged sample apart from those of its own turn
MAX_STAND_INS = 32

Transform = Callable[[Sample, np.ndarray, int, int, int], Any]  # sample, image, position, epoch, sample number


@dataclass(frozen=True)
class StreamOptions:
    """How samples are drawn."""

    window: int = 8  # shards whose samples are mixed; more mixes better and touches more files at a time
    weights: tuple[float, ...] = ()  # of several sets, in the order of data.train; (): by their sizes
    temperature: float = 1.0  # without weights: sizes ** (1 / temperature). 1: as they come; 100: all sets alike
    labelled_fraction: float = 0.0  # share of every batch drawn from labelled samples, class-balanced; 0: as they come
    max_bad_fraction: float = 0.01  # share of damaged samples at which a run stops
    exclude: str = ""  # audit.json (`python -m shards audit`): redundant copies and leaks stay out; of sets: a,b

    def __post_init__(self) -> None:
        if self.window < 1:
            raise DataError(f"window is {self.window}; it counts shards and must be 1 or more")
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise DataError(f"weights are {list(self.weights)}; each must be above 0 (leave a set out of data.train)")
        if not 1 <= self.temperature < float("inf"):
            raise DataError(f"temperature is {self.temperature}; it must be 1 or more")
        for name in ("labelled_fraction", "max_bad_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} is {getattr(self, name)}; it is a share and must lie in 0..1")

    def shares(self, sizes: Sequence[int]) -> list[Fraction]:
        """The share of each set in the stream; they sum to 1. DataError when there are other weights than sets."""
        if self.weights and len(self.weights) != len(sizes):
            raise DataError(f"stream.weights has {len(self.weights)} numbers for {len(sizes)} sets: give one a set")
        if self.weights:
            parts = [Fraction(weight).limit_denominator(1_000_000) or Fraction(weight) for weight in self.weights]
        elif self.temperature == 1:
            parts = [Fraction(size) for size in sizes]
        else:  # whole numbers, so that the last bit of a power cannot change an order
            parts = [Fraction(round(1000 * size ** (1 / self.temperature))) for size in sizes]
        return [part / sum(parts) for part in parts]


class Order:
    """`order(position)` -> (epoch, sample number), a pure function of index, selection, options and seed.

    The plain order shuffles the shards each epoch, then the samples inside every `window` shards. Of a `Mix`, every set
    runs its own epochs, in the order that it has alone, and takes its share of the places. `labelled_fraction` of all
    places are labelled slots, which walk shuffled rounds over the classes of all sets, and each class its own shuffled
    epochs; a sample of several labels counts for its first. Every aligned block of positions has its exact share of
    labelled slots and of each set, where that is a whole number (`Shares`).
    """

    def __init__(self, index: Index, selected: np.ndarray, options: StreamOptions, seed: int = 0):
        if seed < 0:
            raise DataError(f"seed is {seed}; it must be 0 or more")
        selected = np.asarray(selected)
        if not (selected[1:] > selected[:-1]).all():
            selected = np.unique(selected)  # sorted, so also in the order of shards
        if not len(selected):
            raise DataError(f"no sample of {index} is selected, so there is nothing to stream")
        if selected[0] < 0 or selected[-1] >= len(index):
            raise DataError(f"selected samples reach {selected[-1]:,} where {index} has {len(index):,}")
        if len(index) < 1 << 31:
            selected = selected.astype(np.int32)  # half the memory of ten million
        parts = np.split(selected, np.searchsorted(selected, np.array(index.bounds[1:-1], selected.dtype)))
        empty = [i for i, part in enumerate(parts) if not len(part)]
        if empty:
            raise DataError(f"no sample of {index.members[empty[0]]} is selected: leave that set out")
        labelled = Fraction(options.labelled_fraction).limit_denominator(1_000_000)
        shares = options.shares([len(part) for part in parts])
        self._shares = Shares([labelled, *((1 - labelled) * share for share in shares)])
        self._plain = [Epochs(part, index.starts, options.window, seed) for part in parts]
        to_balance = selected if labelled else selected[:0]
        self._rounds = Rounds(to_balance, np.asarray(index.column("label")[to_balance]), seed)
        if labelled and not self._rounds.classes:
            raise DataError(
                f"labelled_fraction is {options.labelled_fraction}, but no selected sample of {index} has a label: "
                "set it to 0, or give the table a label column"
            )

    def __len__(self) -> int:
        """Samples an epoch of the plain order, of all sets together."""
        return sum(len(part) for part in self._plain)

    def __call__(self, position: int) -> tuple[int, int]:
        if position < 0:
            raise IndexError(f"position {position} is negative")
        which, place = self._shares(position)
        return self._plain[which - 1](place) if which else self._rounds(place)

    def shards(self, position: int) -> list[int]:
        """The shards to have at hand around a position, the most urgent first; none for a labelled slot."""
        which, place = self._shares(position)
        return self._plain[which - 1].shards(place) if which else []


class SampleDataset(Dataset):
    """`dataset[position]` -> (transform(sample, image, position, epoch, number), bad).

    `image` is uint8 [H, W, C], a JPEG decoded to a short side of at least `at_least` (0: full), which may be a
    function of the position. A sample that cannot be read is replaced by that of the following position, under an
    epoch of its own, which no other process needs to know; `bad` names what was left out, as dicts of `key`, `shard`
    and `reason`. DataError after 32 in a row, or when the data cannot be fetched.
    """

    def __init__(
        self, index: Index, order: Order, transform: Transform, at_least: int | Callable[[int], int] = 0
    ) -> None:
        self.index, self.order, self.transform, self.at_least = index, order, transform, at_least

    def __getitem__(self, position: int) -> tuple[Any, list[dict[str, str]]]:
        if self.index.remote:
            self.index.ahead(self.order.shards(position))
        at_least = self.at_least(position) if callable(self.at_least) else self.at_least
        bad: list[dict[str, str]] = []
        for attempt in range(MAX_STAND_INS):
            epoch, number = self.order(position + attempt)
            try:
                sample = self.index.read(number)
                image = decode(sample.image, at_least, self.index.channels)
            except FetchError:
                raise  # the sample may be fine
            except DataError as error:
                shard = self.index.shard_of(number)[0]
                bad.append({"key": self.index.key(number), "shard": shard, "reason": str(error)})
                continue
            epoch += attempt * STAND_IN_EPOCH
            return self.transform(sample, image, position, epoch, number), bad
        last = bad[-1]
        raise DataError(
            f"{MAX_STAND_INS} samples in a row cannot be read, the last {last['key']} in {last['shard']}: "
            f"{last['reason']}. Check each set with `python -m shards stats DIR --verify`"
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
    """Writes what could not be read to `quarantine.jsonl`, once each, and stops a run when it is too much.

    The processes of a run share the file, and so count together.
    """

    def __init__(self, path: str | Path, options: StreamOptions, samples: int):
        """`samples`: how many an epoch has, `len(order)`."""
        self.path, self.limit, self.samples = Path(path), options.max_bad_fraction, samples
        self.known = self._written()  # a resumed run goes on where it was

    def add(self, bad: list[dict[str, str]], seen: int) -> None:
        """`bad` as the dataset reports it, `seen`: images read so far. DataError above `max_bad_fraction`."""
        lines = [json.dumps(entry, ensure_ascii=False) for entry in bad]
        new = [line for line in dict.fromkeys(lines) if line not in self.known]
        if new:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in new))
            self.known = self._written()
        allowed = max(1.0, self.limit * min(self.samples, max(seen, 1000)))  # one alone never stops a run
        if len(self.known) > allowed:
            raise DataError(
                f"{len(self.known):,} damaged samples after {seen:,} images are more than max_bad_fraction "
                f"({self.limit}) allows: see {self.path}, mend or remove them, and build or index the folder again"
            )

    def _written(self) -> set[str]:
        return set(self.path.read_text(encoding="utf-8").splitlines()) if self.path.is_file() else set()
