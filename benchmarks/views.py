"""Views a second and core: from the same JPEG to two global and eight local views, ours against the peers'.

.venv/bin/python -m benchmarks.views

One thread; seconds are the process's own, so that other programs on the machine do not count. Every arm gets the same
bytes, crop numbers, sizes, scales and colour strengths, those of lightly's DINOTransform with eight local views. Arms
take turns, so that a slow minute of the machine hits all of them; medians over rounds, ratios within a round.

    ours, worker   what a loader process does: decode, crop, resize, flip, draw parameters, collate; uint8
    ours, device   colour, blur, solarisation, normalisation, where the model is: here the same CPU, on a GPU the GPU
    ours, both     their sum, for a machine whose only device is the CPU
    lightly        Pillow, DINOTransform: normalised float views
    torchvision    its JPEG decoder and transforms v2 on uint8 tensors, the same augmentations
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from statistics import median

import cv2
import numpy as np
import torch
from lightly.transforms import DINOTransform
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from benchmarks.common import machine, write_results
from hybridssl.types import Batch
from hybridssl.views import Item, ViewOptions, collate, crop, generator, render
from shards.format import decode

SIDES, PICTURES, ROUNDS = (1024, 256), 8, 7
OPTIONS = ViewOptions(global_scale=(0.4, 1.0), local_scale=(0.05, 0.4), vflip=0.0)
LIGHTLY = DINOTransform(n_local_views=OPTIONS.local_count)
NO_LABELS = np.zeros(0, np.uint8)


def main() -> None:
    torch.set_num_threads(1)
    document: dict = {"options": "2 x 224 + 8 x 96, scales .4-1 and .05-.4", "sides": {}}
    for side in SIDES:
        files = [jpeg(side, seed) for seed in range(PICTURES)]
        document["sides"][side] = compare(files) | {"kilobytes": round(sum(map(len, files)) / len(files) / 1000)}
    document["device"] = on_gpu() if torch.cuda.is_available() else "no GPU here: the device's part ran on the CPU"
    write_results("views.json", {**machine(), "command": "python -m benchmarks.views", **document})


def compare(files: list[bytes]) -> dict:
    """Seconds an image of each arm, in turns."""
    batch = worker(files)
    arms: dict[str, Callable[[], object]] = {
        "ours, worker": lambda: worker(files),
        "ours, device": lambda: render(batch, OPTIONS),
        "lightly": lambda: [LIGHTLY(Image.open(io.BytesIO(data)).convert("RGB")) for data in files],
        "torchvision": lambda: [torchvision_views(data) for data in files],
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(ROUNDS + 1):
        for name, work in arms.items():
            start = time.process_time()
            work()
            if number:  # the first round warms caches
                seconds[name].append((time.process_time() - start) / len(files))
    seconds["ours, both"] = [a + b for a, b in zip(seconds["ours, worker"], seconds["ours, device"], strict=True)]
    found = {
        "images_per_s": {name: round(1 / median(took), 1) for name, took in seconds.items()},
        "times_as_fast": {
            f"{ours} / {peer}": ratios(seconds[peer], seconds[ours])
            for peer in ("lightly", "torchvision")
            for ours in ("ours, worker", "ours, both")
        },
    }
    print(found)
    return found


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Median, smallest and largest of the ratios within rounds."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": round(median(each), 2), "low": round(min(each), 2), "high": round(max(each), 2)}


def worker(files: list[bytes]) -> Batch:
    """What a loader process does for a batch."""
    items = []
    for number, data in enumerate(files):
        image = decode(data, OPTIONS.decode_at_least())
        items.append(Item(crop(image, generator(0, 0, number), OPTIONS, 16, number, clean=False), NO_LABELS))
    return collate(items)


def torchvision_views(data: bytes) -> list[torch.Tensor]:
    image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return [view(image) for view in TORCHVISION]


def torchvision_view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> v2.Compose:
    o = OPTIONS
    jitter = v2.ColorJitter(o.brightness, o.contrast, o.saturation, o.hue)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale, antialias=True),
            v2.RandomHorizontalFlip(o.hflip),
            v2.RandomApply([jitter], o.jitter),
            v2.RandomGrayscale(o.grayscale),
            v2.RandomApply([v2.GaussianBlur(13, o.blur_sigma)], blur),
            v2.RandomSolarize(128, solarize),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(o.mean), list(o.std)),
        ]
    )


TORCHVISION = [
    torchvision_view(OPTIONS.global_size, OPTIONS.global_scale, OPTIONS.blur[0], 0),
    torchvision_view(OPTIONS.global_size, OPTIONS.global_scale, OPTIONS.blur[1], OPTIONS.solarize),
    *[torchvision_view(OPTIONS.local_size, OPTIONS.local_scale, OPTIONS.blur[2], 0)] * OPTIONS.local_count,
]


def jpeg(side: int, seed: int) -> bytes:
    """A made-up photograph: the 1/f spectrum of natural images, channels that go together; quality 90, 4:2:0."""
    rng = np.random.default_rng(seed)
    radius = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    radius[0, 0] = np.inf
    layers = np.stack([np.fft.ifft2(np.fft.fft2(rng.normal(size=(side, side))) / radius**1.2).real for _ in range(3)])
    layers /= layers.std((1, 2), keepdims=True)
    mixed = np.tensordot([[1.0, 0.2, 0.1], [1.0, -0.1, 0.1], [1.0, -0.1, -0.2]], layers, 1).transpose(1, 2, 0)
    pixels = (128 + 45 * mixed).clip(0, 255).astype(np.uint8)
    ok, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert ok
    return data.tobytes()


def on_gpu() -> dict[str, float]:
    """Milliseconds of the device's part for a batch of 64, by CUDA events."""
    batch = worker([jpeg(256, seed) for seed in range(PICTURES)] * (64 // PICTURES)).to("cuda")
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(20)]
    for begin, end in marks:
        begin.record()
        render(batch, OPTIONS)
        end.record()
    torch.cuda.synchronize()
    return {"images": 64, "milliseconds": round(median(begin.elapsed_time(end) for begin, end in marks[5:]), 2)}


if __name__ == "__main__":
    main()
