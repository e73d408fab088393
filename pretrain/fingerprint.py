"""What the doctor looks at before it proposes anything: the images, what is said of them, and the machine."""

from __future__ import annotations

import io
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image

from hybridssl import dist
from hybridssl.errors import UserError
from pretrain.reach import within_reach
from shards.errors import DataError
from shards.format import decode
from shards.index import Index

PICTURES = 200  # decoded for size, colour and statistics
ROWS = 2_000  # labelled images whose every label is read
GREY = 2.0  # mean difference between channels, of 255, up to which an image has no colour (JPEG invents a little)


@dataclass(frozen=True)
class Data:
    """The training split of an index, in numbers. Per-channel values are in 0..1."""

    images: int
    short_side: int = 224  # median, in pixels
    channels: int = 3  # as the index reads them
    grey: bool = False  # no image that was looked at has a colour
    bits: int = 8  # of a channel in the files
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    per_class: dict[str, int] = field(default_factory=dict)  # labelled images by first label; no class without one
    several: float = 0.0  # share of the labelled images that carry two labels or more
    sources: dict[str, int] = field(default_factory=dict)
    groups: int = 0
    texts: int = 0
    masks: int = 0
    looked_at: int = 0
    damaged: int = 0

    @property
    def labelled(self) -> int:
        return sum(self.per_class.values())


@dataclass(frozen=True)
class Machine:
    """Where it is to run. Memory in GiB."""

    cores: int
    memory: float
    gpus: int = 0
    gpu: str = ""  # name
    gpu_memory: float = 0.0  # of the smallest
    bf16: bool = False  # has units for it: GPU, or CPU where there is no GPU
    processes: int = 1  # of the run
    had: frozenset[str] = frozenset()  # timm names whose released weights lie on this machine


def data(index: Index, splits: Sequence[str]) -> Data:
    """The fingerprint of the samples in `splits`. UserError when there is nothing to train on."""
    try:
        chosen = index.select(splits)
    except DataError as error:
        raise UserError(
            f"{error}: nothing to train on. Build it again with --split 70/10/20, or name splits that are there, "
            "such as data.splits=[val]"
        ) from error
    label, source, group = (np.asarray(index.column(name)[chosen]) for name in ("label", "source", "group"))
    classes = np.bincount(label[label >= 0], minlength=len(index.classes))
    return Data(
        images=len(chosen),
        channels=index.channels,
        per_class={name: int(n) for name, n in zip(index.classes, classes, strict=True) if n},
        several=_several(index, chosen[label >= 0]),
        sources={name: int((source == i).sum()) for i, name in enumerate(index.sources) if (source == i).any()},
        groups=len(np.unique(group[group != 0])),
        texts=int((index.column("txt")[chosen, 1] > 0).sum()),
        masks=int((index.column("mask")[chosen, 1] > 0).sum()),
        **_pictures(index, spread(within_reach(index, chosen), PICTURES)),
    )


def spread(numbers: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of `numbers`, evenly spread."""
    return numbers[np.unique(np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(int))]


def _several(index: Index, labelled: np.ndarray) -> float:
    if not len(labelled):
        return 0.0
    counts = []
    for number in spread(within_reach(index, labelled), ROWS).tolist():
        try:
            counts.append(len(index.labels(number)))
        except DataError:  # the stream will name it
            continue
    return float(np.mean(np.array(counts) > 1)) if counts else 0.0


def _pictures(index: Index, numbers: np.ndarray) -> dict:
    """What only the images themselves tell. UserError when none of those looked at can be read."""
    sides, bits, means, squares, coloured = [], [], [], [], 0
    for number in numbers.tolist():
        try:
            raw = index.read(number).image
            image = decode(raw, 64, index.channels)
            with Image.open(io.BytesIO(raw), formats=("JPEG", "PNG", "WEBP", "TIFF")) as file:
                sides.append(min(file.size))
                bits.append(16 if file.mode.startswith("I") else 8)
        except (DataError, OSError, Image.DecompressionBombError):
            continue
        pixels = image.reshape(-1, index.channels).astype(np.float64)
        coloured += bool(np.abs(pixels - pixels.mean(axis=1, keepdims=True)).mean() > GREY)
        means.append(pixels.mean(axis=0) / 255)
        squares.append((pixels**2).mean(axis=0) / 255**2)
    if not sides:
        raise UserError(
            f"none of the {len(numbers):,} images looked at in {index} can be read: check the folder with "
            f"`python -m shards stats DIR --verify`"
        )
    mean = np.mean(means, axis=0)
    std = np.sqrt(np.maximum(np.mean(squares, axis=0) - mean**2, 1e-4))
    return {
        "short_side": int(np.median(sides)),
        "grey": coloured == 0,
        "bits": max(bits),
        "mean": tuple(round(float(v), 3) for v in mean),
        "std": tuple(round(float(v), 3) for v in std),
        "looked_at": len(numbers),
        "damaged": len(numbers) - len(sides),
    }


def machine(candidates: Sequence[str] = ()) -> Machine:
    """This machine. `candidates`: timm names whose weights are looked for; no network is touched."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # A launcher has said how many processes there will be; else one a GPU, as `accelerate launch` starts them.
    processes = int(os.environ.get("WORLD_SIZE", 0)) or max(gpus, 1)
    devices = [torch.cuda.get_device_properties(i) for i in range(gpus)]
    return Machine(
        cores=dist.cores(),
        memory=_memory() / 2**30,
        gpus=gpus,
        gpu=devices[0].name if gpus else "",
        gpu_memory=min((d.total_memory for d in devices), default=0) / 2**30,
        bf16=torch.cuda.is_bf16_supported(including_emulation=False) if gpus else _cpu_bf16(),
        processes=processes,
        had=frozenset(name for name in candidates if _is_had(name)),
    )


def _memory() -> int:
    """Bytes of RAM, or of the container's share of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(total, int(text)) if text.isdigit() else total


def _cpu_bf16() -> bool:
    """Without such units bf16 is many times slower than float32 (docs/log.md)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return platform.processor() == "arm"
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def _is_had(name: str) -> bool:
    about = timm.get_pretrained_cfg(name)
    hub = about.hf_hub_id if about else None
    return bool(hub) and isinstance(try_to_load_from_cache(hub, "model.safetensors"), str)
