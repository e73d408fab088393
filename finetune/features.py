"""Frozen features of the samples of an index: computed once, kept by backbone and index hash, told apart by number."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from finetune.encoder import Encoder
from hybridssl.files import writing
from hybridssl.views import resize_for_eval
from shards.errors import DataError
from shards.format import decode
from shards.index import Index
from shards.terminal import Terminal

LAYOUT = 2  # raise it when every backbone would give other features than before; of a few, `Encoder.reading` tells


@dataclass(frozen=True)
class ImageChange:
    """Something done to every image after resizing, such as a corruption of known strength."""

    name: str  # part of the name under which features are kept
    function: Callable[[np.ndarray, int], np.ndarray]  # uint8 [C, S, S] and the sample number -> uint8 [C, S, S]


@dataclass(frozen=True)
class Features:
    """Features of N samples, in the order asked for; samples that do not decode are left out and named in `bad`."""

    x: dict[str, np.ndarray]  # kind -> float32 [N, D]: "cls", and "patch_mean" where the backbone has patches
    y: np.ndarray  # uint8 [N, K] multi-hot over `classes`; an all-zero row is unlabelled
    numbers: np.ndarray  # int64 [N], sample numbers in the index
    source: np.ndarray  # int32 [N], -1: none
    group: np.ndarray  # int64 [N], hash of the patient or lesion; an image without one is a group of its own
    classes: tuple[str, ...]
    index: Index
    bad: list[dict[str, str]] = field(default_factory=list)  # key, shard, reason

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, rows: np.ndarray) -> Features:
        """The samples `rows` (positions or a mask), in that order."""
        x = {kind: values[rows] for kind, values in self.x.items()}
        picked = {name: getattr(self, name)[rows] for name in ("y", "numbers", "source", "group")}
        return Features(x, **picked, classes=self.classes, index=self.index)

    @property
    def label(self) -> np.ndarray:
        """int64 [N]: the class of each sample, -1 for none. Meant for sets with one class a sample."""
        return np.where(self.y.any(1), self.y.argmax(1), -1)


def groups_of(index: Index, numbers: np.ndarray) -> np.ndarray:
    """int64 [N] group hashes, where an image without a group gets one of its own (its number, made negative)."""
    group = np.asarray(index.column("group")[numbers])
    return np.where(group == 0, -1 - np.asarray(numbers), group)


def default_cache() -> Path:
    """$HYBRIDSSL_CACHE, or ~/.cache/hybridssl; features lie in `features` below it."""
    return Path(os.environ.get("HYBRIDSSL_CACHE") or Path.home() / ".cache" / "hybridssl") / "features"


def extract(
    encoder: Encoder,
    index: Index,
    numbers: np.ndarray,
    batch: int = 64,
    workers: int = 0,
    cache: Path | None = None,
    change: ImageChange | None = None,
) -> Features:
    """Features of the samples `numbers`; those already in `cache` are read, the others computed and added to it.

    change: what is done to every image first; its name must tell all that it depends on.
    """
    numbers = np.asarray(numbers, dtype=np.int64)
    if index.channels != encoder.channels:
        raise DataError(f"{encoder.name} takes {encoder.channels} channels, {index.root} has {index.channels}")
    file = cache / f"{fingerprint(encoder, index, change.name if change else '')}.safetensors" if cache else None
    known = _read(file)
    missing = np.setdiff1d(numbers, known["numbers"]) if known else np.unique(numbers)
    bad: list[dict[str, str]] = []
    if len(missing):
        fresh, bad = _compute(encoder, index, missing, batch, workers, change)
        # Another process may have added to the file meanwhile: what it knows now counts, not what it knew before.
        known = _merge(_read(file) or known, fresh)
        if file and known:
            _write(file, known)
    if not known or not len(known["numbers"]):
        raise DataError(
            f"none of the {len(numbers):,} images of {index.root} could be decoded; first: {bad[0]['reason']}"
        )
    order = np.argsort(known["numbers"])
    at = np.searchsorted(known["numbers"], numbers, sorter=order)
    rows = order[np.minimum(at, len(order) - 1)]
    there = known["numbers"][rows] == numbers
    rows, numbers = rows[there], numbers[there]
    return Features(
        x={kind.removeprefix("x/"): known[kind][rows] for kind in sorted(known) if kind.startswith("x/")},
        y=known["y"][rows],
        numbers=numbers,
        source=np.asarray(index.column("source")[numbers]),
        group=groups_of(index, numbers),
        classes=index.classes,
        index=index,
        bad=bad,
    )


class _Images(torch.utils.data.Dataset):
    """number -> (number, uint8 [C, S, S], label ids) or (number, None, reason)."""

    def __init__(self, index: Index, numbers: np.ndarray, size: int, change: ImageChange | None = None) -> None:
        self.index, self.numbers, self.size, self.change = index, numbers, size, change
        self.ids = {name: k for k, name in enumerate(index.classes)}

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: int) -> tuple[int, np.ndarray | None, Any]:
        number = int(self.numbers[at])
        try:
            sample = self.index.read(number)
            image = resize_for_eval(decode(sample.image, self.size, self.index.channels), self.size)
        except DataError as error:
            return number, None, str(error)
        if self.change:
            image = self.change.function(image, number)
        return number, image, [self.ids[name] for name in sample.labels if name in self.ids]


def _compute(
    encoder: Encoder, index: Index, numbers: np.ndarray, batch: int, workers: int, change: ImageChange | None
) -> tuple[dict[str, np.ndarray], list[dict[str, str]]]:
    loader = torch.utils.data.DataLoader(
        _Images(index, numbers, encoder.input_size, change), batch_size=batch, num_workers=workers, collate_fn=list
    )
    parts: dict[str, list[np.ndarray]] = {"numbers": [], "y": []}
    bad: list[dict[str, str]] = []
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Terminal(stderr=True)) as progress:
        task = progress.add_task(
            f"features of {encoder.name}{f', {change.name}' if change else ''}", total=len(numbers), rate=""
        )
        for rows in loader:
            good = [row for row in rows if row[1] is not None]
            for number, _, reason in (row for row in rows if row[1] is None):
                bad.append({"key": index.key(number), "shard": index.shard_of(number)[0], "reason": reason})
            if good:
                found = encoder.features(torch.from_numpy(np.stack([image for _, image, _ in good])))
                for kind, x in found.items():
                    parts.setdefault(f"x/{kind}", []).append(x.numpy())
                parts["numbers"].append(np.array([number for number, _, _ in good], dtype=np.int64))
                y = np.zeros((len(good), len(index.classes)), dtype=np.uint8)
                for row, (_, _, ids) in enumerate(good):
                    y[row, ids] = 1
                parts["y"].append(y)
            speed = progress.tasks[task].speed
            progress.update(task, advance=len(rows), rate=f"{speed:,.0f} images/s" if speed else "")
    return {name: np.concatenate(values) for name, values in parts.items() if values}, bad


def fingerprint(encoder: Encoder, index: Index, *more: object) -> str:
    """Names what an encoder makes of an index, and all else that its features depend on; "" tells nothing."""
    parts: Sequence[object] = (
        LAYOUT, encoder.sha256, index.sha256, encoder.input_size, *map(float, (*encoder.mean, *encoder.std))
    )  # fmt: skip
    return hashlib.sha256(repr((*parts, *filter(None, (encoder.reading, *more)))).encode()).hexdigest()[:32]


def _read(file: Path | None) -> dict[str, np.ndarray] | None:
    """A cache file, or None; a damaged one counts as none, since all of it can be computed again."""
    if file is None or not file.is_file():
        return None
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        return None


def _merge(known: dict[str, np.ndarray] | None, fresh: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    if not known or not fresh:
        return fresh or known
    new = ~np.isin(fresh["numbers"], known["numbers"])
    return {name: np.concatenate([known[name], fresh[name][new]]) for name in known}


def _write(file: Path, arrays: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with writing(partial):
        save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, partial)
    os.replace(partial, file)
