"""Patch features and masks of many samples, computed once: what segmentation heads are trained and judged on.

They are kept by backbone and index hash up to KEPT bytes: the patches of an image are a hundred times as large as its
one vector.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from finetune.encoder import Encoder
from finetune.features import fingerprint, groups_of
from finetune.masks import FOREGROUND, Pairs
from finetune.patches import block_maps, last_map
from hybridssl.errors import UserError
from hybridssl.files import writing
from shards.errors import DataError
from shards.index import Index
from shards.terminal import Terminal

Array = np.ndarray
IN_MEMORY = 2**30  # bytes; larger arrays are mapped to a temporary file
KEPT = 2 * 2**30  # bytes; more than that is computed again


@dataclass(frozen=True)
class Samples:
    """Features and masks of N samples on one grid. Samples that cannot be read are left out and named in `bad`."""

    numbers: Array  # int64 [N], sample numbers in the index
    group: Array  # int64 [N]
    masks: Array  # uint8 [N, S, S]
    maps: dict[str, list[Array]]  # "patches": one float16 [N, D, h, w]; "blocks": one a level
    classes: tuple[str, ...]  # what the values 1.. of the masks are called
    device: str = "cpu"
    bad: list[dict[str, str]] = field(default_factory=list)  # key, shard, reason

    @property
    def size(self) -> int:
        """S, pixels."""
        return self.masks.shape[-1]

    def levels(self, reads: str, rows: Array) -> list[Tensor]:
        """The maps of the samples `rows`: float32 [n, D, h, w] on `device`, one a level."""
        return [torch.from_numpy(level[rows]).float().to(self.device) for level in self.maps[reads]]


def collect(
    encoder: Encoder,
    index: Index,
    numbers: Array,
    classes: Sequence[str] = FOREGROUND,
    reads: Sequence[str] = ("patches", "blocks"),
    batch: int = 64,
    workers: int = 0,
    cache: Path | None = None,
) -> Samples:
    """The maps named in `reads`, and the masks, of the samples `numbers` at the encoder's size.

    Read from `cache` where an earlier call left the same there. UserError when the backbone has no patches, or "blocks"
    are asked for and it shows none.
    """
    if cache is None:
        return _compute(encoder, index, numbers, classes, reads, batch, workers)
    asked = [hashlib.sha256(np.asarray(numbers, dtype=np.int64).tobytes()).hexdigest(), *classes, *reads]
    file = cache / f"patches-{fingerprint(encoder, index, *asked)}.safetensors"
    kept = _read(file, index, classes, encoder.device)
    if kept is None:
        kept = _compute(encoder, index, numbers, classes, reads, batch, workers)
        _write(file, kept)
    return kept


def _read(file: Path, index: Index, classes: Sequence[str], device: str) -> Samples | None:
    """Samples as `_write` left them; None where there are none, or a damaged file, which can be computed again."""
    try:
        with safe_open(file, "np") as kept:
            arrays = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
            bad = json.loads(kept.metadata()["bad"])
    except (OSError, SafetensorError):
        return None
    maps: dict[str, list[Array]] = {}
    for name in sorted(name for name in arrays if "/" in name):
        maps.setdefault(name.partition("/")[0], []).append(arrays[name])
    numbers = arrays["numbers"]
    return Samples(numbers, groups_of(index, numbers), arrays["masks"], maps, tuple(classes), device, bad)


def _write(file: Path, samples: Samples) -> None:
    """Keep them, unless they are larger than KEPT or than half of what is free on the disk."""
    arrays = {"numbers": samples.numbers, "masks": samples.masks}
    arrays |= {f"{name}/{n:02d}": level for name, levels in samples.maps.items() for n, level in enumerate(levels)}
    file.parent.mkdir(parents=True, exist_ok=True)
    if sum(array.nbytes for array in arrays.values()) > min(KEPT, shutil.disk_usage(file.parent).free / 2):
        return
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with writing(partial):
        save_file(whole, partial, metadata={"bad": json.dumps(samples.bad)})
    os.replace(partial, file)


def _compute(
    encoder: Encoder,
    index: Index,
    numbers: Array,
    classes: Sequence[str],
    reads: Sequence[str],
    batch: int,
    workers: int,
) -> Samples:
    if index.channels != encoder.channels:
        raise DataError(f"{encoder.name} takes {encoder.channels} channels, {index.root} has {index.channels}")
    sources = {name: maps_of(encoder, name) for name in reads}
    pairs = Pairs(index, np.asarray(numbers, dtype=np.int64), encoder.input_size, classes)
    loader = torch.utils.data.DataLoader(pairs, batch_size=batch, num_workers=workers, collate_fn=list)
    masks = _room((len(numbers), encoder.input_size, encoder.input_size), np.uint8)
    maps: dict[str, list[Array]] = {}
    kept: list[int] = []
    bad: list[dict[str, str]] = []
    with progress(f"patches of {encoder.name}", len(numbers)) as advance:
        for rows in loader:
            good = [(number, image, mask) for number, image, mask in rows if image is not None]
            for number, _, reason in (row for row in rows if row[1] is None):
                bad.append({"key": index.key(number), "shard": index.shard_of(number)[0], "reason": reason})
            if good:
                images = torch.from_numpy(np.stack([image for _, image, _ in good]))
                at = slice(len(kept), len(kept) + len(good))
                masks[at] = [mask for _, _, mask in good]
                for name, source in sources.items():
                    found = [half(x) for x in source(images)]
                    if name not in maps:
                        maps[name] = [_room((len(numbers), *x.shape[1:]), np.float16) for x in found]
                    for level, x in zip(maps[name], found, strict=True):
                        level[at] = x
                kept += [number for number, _, _ in good]
            advance(len(rows))
    if not kept:
        raise DataError(f"none of the {len(numbers):,} masks of {index.root} can be used; first: {bad[0]['reason']}")
    chosen = np.array(kept, dtype=np.int64)
    shown = {name: [level[: len(kept)] for level in levels] for name, levels in maps.items()}
    return Samples(chosen, groups_of(index, chosen), masks[: len(kept)], shown, tuple(classes), encoder.device, bad)


def maps_of(encoder: Encoder, reads: str) -> Callable[[Tensor], list[Tensor]]:
    """The maps that a head reads: "patches" or "blocks". UserError when the backbone does not show its blocks."""
    if reads == "patches":
        return last_map(encoder)
    blocks = block_maps(encoder)
    if blocks is None:
        raise UserError(f"{encoder.name} shows no blocks, which upernet needs: choose --heads linear knn")
    return blocks


def half(x: Tensor) -> Array:
    """As it is stored: 16 bits, which keep three digits."""
    return x.clamp(-65504, 65504).half().numpy()


def _room(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array in memory, or of a temporary file that vanishes with it."""
    need = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if need <= IN_MEMORY:
        return np.empty(shape, dtype)
    folder = tempfile.gettempdir()
    if need > 0.9 * shutil.disk_usage(folder).free:
        raise UserError(
            f"patch features need {need / 1e9:.1f} GB in {folder}, which has less: set TMPDIR to a larger disk, or a "
            "smaller --size, fewer --heads or --labels"
        )
    return np.memmap(tempfile.TemporaryFile(dir=folder), dtype, "w+", shape=shape)  # type: ignore[call-overload]


@contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; gives the function that moves it on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Terminal(stderr=True)) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.advance(task, count)
