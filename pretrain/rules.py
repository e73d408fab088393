"""The doctor's rules: one number or pair each, from numbers alone, with the figure or paper that it rests on.

FACTS and "log" below are the figures of docs/log.md and of the recipes' headers. A rule without a measurement of ours
says whose it is.
"""

from __future__ import annotations

import math

GROUP = 16  # images among which `spread` seeks neighbours: micro-batches are multiples of it
MULTI = 0.01  # share of images with two labels from which one diagnosis an image is no longer the picture


def batch_size(images: int, processes: int) -> int:
    """Images a step. Small sets want many steps; ViT-S and B were trained with 1,024 to 3,072 on a million (DINO, v2).

    32 below 1,000 images, 64 below 10,000 (`ham-cpu`, `small-data`), 128 below 50,000 (nanopath), 256 below 200,000
    (`derm-s`), 512 below a million, then 1,024; whole groups of 16 on every process.
    """
    bounds = ((1_000, 32), (10_000, 64), (50_000, 128), (200_000, 256), (1_000_000, 512))
    wanted = next((size for bound, size in bounds if images < bound), 1024)
    return GROUP * processes * max(1, round(wanted / (GROUP * processes)))


def presentations(images: int, batch: int, continuing: bool, cpu: bool) -> int:
    """Images to be shown in the whole run.

    From scratch 60 times each on a CPU: 420,000 of HAM10000's 7,000 are what first beat every baseline without labels;
    200 times on a GPU (DINOv2's short schedule, and DermINO's 82 million of 432,776); never fewer than 3,000 steps
    (`ham-cpu`: .321 kNN there, .248 after a quarter). Continuing 20 times each: a million on pathology in nanopath, and
    longer lowers scores; at least 128,000 (`small-data`).
    """
    if continuing:
        return max(20 * images, 128_000)
    return max((60 if cpu else 200) * images, 3_000 * batch)


def patch_size(size: int, cpu: bool) -> int:
    """The largest of 16, 8, 4 that leaves a grid to learn from: 4 x 4 on a CPU, where patch 8 at 64 px was too dear
    (log), else 8 x 8."""
    least = 4 if cpu else 8
    return next((patch for patch in (16, 8) if size >= least * patch), 4)


def patch_objective(grid: int, continuing: bool) -> str:
    """What hidden patches give back, in views of `grid` patches a side: their prototypes (`ibot`, DINOv2); from scratch
    below 8 x 8 their `pixels`, which at 4 x 4 had .491 on the mean of seven figures and not .426 (`ham-cpu`, log).
    """
    return "ibot" if continuing or grid >= 8 else "pixels"


def global_size(short_side: int, wanted: int, patch: int, least: int = 1) -> int:
    """Pixels: what is wanted, no more than the images have, `least` patches or more; a multiple of the patch."""
    return patch * max(min(short_side, wanted) // patch, least)


def local_size(size: int, patch: int) -> int:
    """Pixels: 98 beside 224 (DINOv2), 32 beside 64; two patches at least."""
    return patch * max(2, round(7 / 16 * size / patch))


def scales(images: int, size: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Shares of the area of global and local crops: DINO's; larger ones for few or small images, whose small crops show
    little of one object (`ham-cpu`, `small-data`)."""
    return ((0.4, 1.0), (0.1, 0.4)) if images < 10_000 or size < 128 else ((0.32, 1.0), (0.05, 0.32))


def local_count(images: int, cpu: bool) -> int:
    """Small crops an image: DINO's 8; 6 for few images (`small-data`), 4 where cores are few (`ham-cpu`)."""
    return 4 if cpu else 6 if images < 5_000 else 8


def prototypes(images: int) -> int:
    """K: about one for eight images, a power of two from 256 to 8,192; 65,536 from 500,000 images on (DINOv2).

    512 served HAM10000's 7,000 and 1k-8k suffice for small data; each costs memory and, below its images, stays empty.
    """
    if images >= 500_000:
        return 65_536
    return min(max(2 ** int(math.log2(max(images, 1) / 8 + 1)), 256), 8_192)


def head_width(images: int, cpu: bool) -> tuple[int, int]:
    """(hidden, bottleneck) of the prototype heads: DINOv2's 2,048 and 256, narrower where images or cores are few."""
    return (512, 128) if cpu else (1024, 128) if images < 10_000 else (2048, 256)


def momentum(steps: int, continuing: bool) -> tuple[float, float]:
    """Of the teacher, from first to second. It averages over 1 / (1 - m) steps: a sixty-fifth of the run at first.

    [.9, .98] at 650 steps, [.98, .998] at 3,000 and [.99, .9995] at 6,500 worked here, and .98 -> 1 over 250 left the
    teacher at its start (log); .994 -> 1 is what long runs have. Released weights are a teacher worth keeping longer.
    """
    start = min(max(1 - 65 / max(steps, 1), 0.9), 0.994)
    end = 1.0 if continuing or steps >= 20_000 else max(1 - 6 / max(steps, 1), start)
    return round(max(start, 0.99) if continuing else start, 3), round(end, 4)


def teacher_temperature(steps: int) -> float:
    """Where its warm-up ends. .05 below 10,000 steps (`demo`, `ham-cpu`): targets that stay near ln K for hundreds of
    steps teach nothing; DINOv2's .07 above."""
    return 0.05 if steps < 10_000 else 0.07


def freeze_last(images: int, shown: int) -> float:
    """Share of the run in which prototypes rest: one epoch (DINO), within 1 and 5 %."""
    return round(min(max(images / shown, 0.01), 0.05), 3)


def labelled_fraction(labelled: int, images: int) -> float:
    """Share of a batch drawn from labelled images, evenly over classes: a quarter, but no image four times as often as
    it would come. Such a draw helped where inverse-frequency weights hurt (FACTS); more of it over-fits.
    """
    return round(min(0.25, 4 * labelled / images), 2)


def label_start(labelled: int, images: int, continuing: bool) -> float:
    """Share of the run at which labels join. Few of them late, in images as they come: 706 of 7,037, shown 18 times and
    not 147, gave .495 and not .42 (`ham-cpu`, log). Where most images have one, or weights were released, the start.
    """
    return 0.0 if continuing or labelled > images / 4 else 0.7


def label_kind(several: float) -> str:
    """One diagnosis an image (softmax) or several findings (sigmoids)."""
    return "multi" if several >= MULTI else "one_of"


def micro_batch(share: int, fits: float) -> int:
    """Images a pass: the largest part of a process's `share` of the batch that fits, in whole groups of 16 if any."""
    parts = [n for n in range(1, share + 1) if share % n == 0 and n <= max(fits, 1)]
    return max(parts, key=lambda n: (n % GROUP == 0, n))


def learning_rate(batch: int, continuing: bool, small: bool) -> float:
    """For 1,024 images. Continuing, a peak of 1e-4 at any batch (nanopath, `small-data`); else 2e-3 (`derm-s`), or 3e-3
    for networks of a CPU's size (`ham-cpu`)."""
    if continuing:
        return float(f"{1e-4 / math.sqrt(batch / 1024):.2g}")
    return 3e-3 if small else 2e-3


def layer_decay(images: int) -> float:
    """Continuing: the fewer the images, the less early blocks move (`small-data`, nanopath, `derm-b`)."""
    return 0.65 if images < 5_000 else 0.7 if images < 50_000 else 0.8


def anchor(images: int) -> float:
    """Weight of the tie to the released weights; after unfreezing, kNN can fall from 80 % to 10 % without one."""
    return 1.0 if images < 5_000 else 0.5 if images < 50_000 else 0.0


def workers(cores: int, processes: int, cpu: bool) -> int:
    """Loader processes per process of the run: on a CPU the model needs the cores itself."""
    return 1 if cpu else max(1, min(16, cores // processes - 1))


def neighbours(micro: int) -> int:
    """Images among which `spread` seeks neighbours: 16, or the largest number below it that divides a pass."""
    return next(n for n in range(GROUP, 0, -1) if micro % n == 0)


def tidy(steps: float) -> int:
    """Two digits that mean something: 6,597 -> 6,600."""
    scale = 10 ** max(int(math.log10(max(steps, 1))) - 1, 0)
    return max(1, round(steps / scale) * scale)
