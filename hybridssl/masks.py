"""Which patches of a global view the student does not see: how many, and which ones."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Shape = Literal["block", "random", "inverse_block"]

MIN_BLOCK = 4  # patches, and
ASPECT = 0.3  # height / width of a block lies in [ASPECT, 1 / ASPECT]: BEiT (arXiv 2106.08254), section 2.3, and iBOT

_PLASTIC = 1.3247179572447460  # x^3 = x + 1: the golden ratio's sister in two dimensions
_STEPS = (1 / _PLASTIC, 1 / _PLASTIC**2)


def mask_counts(position: int, patches: int, probability: float, ratio: tuple[float, float]) -> list[int]:
    """How many of `patches` to hide in the two global views of the sample at `position` of the stream; 0: unmasked.

    The two views walk a two-dimensional low-discrepancy sequence (the additive recurrence of the plastic number).
    So any run of positions, and therefore any batch on any number of ranks, masks `probability` of its views and
    covers `ratio` evenly, without a step in which the samples of a batch have to know of each other.
    """
    counts = []
    for step in _STEPS:
        u = (0.5 + (position + 1) * step) % 1.0
        share = ratio[0] + (ratio[1] - ratio[0]) * u / probability if u < probability else 0.0
        counts.append(round(share * patches))
    return counts


def draw_mask(rng: np.random.Generator, grid: tuple[int, int], count: int, shape: Shape = "block") -> np.ndarray:
    """A bool mask [h * w], row-major over `grid`, with exactly `count` patches hidden, drawn from `rng` alone.

    block: several rectangles (BEiT). random: single patches, all alike (MAE, arXiv 2111.06377). inverse_block: all but
    one rectangle (CAPI, arXiv 2502.08769). Raises ValueError when the grid does not hold `count` patches.
    """
    height, width = grid
    if not 0 <= count <= height * width:
        raise ValueError(f"cannot hide {count} of {height} x {width} patches")
    if shape == "inverse_block":
        return ~_rectangle(rng, grid, height * width - count)
    if shape == "random":
        mask = np.zeros(height * width, dtype=bool)
        mask[rng.permutation(height * width)[:count]] = True
        return mask
    return _blocks(rng, grid, count)


def draw_left_out(rng: np.random.Generator, grid: tuple[int, int], share: float) -> np.ndarray:
    """A bool mask [h * w] with `share` of the patches, single ones and never all, that are not shown."""
    patches = grid[0] * grid[1]
    return draw_mask(rng, grid, min(round(share * patches), patches - 1), "random")


def _rectangle(rng: np.random.Generator, grid: tuple[int, int], count: int) -> np.ndarray:
    """bool [h * w], True in one rectangle of `count` patches, its last column cut short where they do not fill it.

    It is laid anywhere on the torus, so that every patch has the same chance; without that the middle would be seen
    more often than the borders (CAPI rolls its masks for the same reason).
    """
    height, width = grid
    aspect = math.exp(rng.uniform(math.log(0.5), math.log(2)))  # height / width
    h = min(max(round(math.sqrt(count * aspect)), 1), height)
    h = max(h, math.ceil(count / width))  # or it would be wider than the grid
    rectangle = np.zeros((height, width), dtype=bool)
    columns, rows = np.divmod(np.arange(count), h)  # column by column: only the last one can be short
    rectangle[rows, columns] = True
    return np.roll(rectangle, (rng.integers(height), rng.integers(width)), axis=(0, 1)).reshape(-1)


def _blocks(rng: np.random.Generator, grid: tuple[int, int], count: int) -> np.ndarray:
    """bool [h * w], `count` of them True, in rectangles.

    Every block covers a random patch that is still visible, so each one makes progress, however full the mask, and the
    borders have their share. The last block is trimmed to what is left.
    """
    height, width = grid
    mask = np.zeros((height, width), dtype=bool)
    flat = mask.reshape(-1)
    left = count
    while left:
        area = rng.uniform(min(MIN_BLOCK, left), left)
        aspect = math.exp(rng.uniform(math.log(ASPECT), -math.log(ASPECT)))
        h = min(max(round(math.sqrt(area * aspect)), 1), height)
        w = min(max(round(math.sqrt(area / aspect)), 1), width)
        visible = np.flatnonzero(~flat)
        y, x = divmod(int(visible[rng.integers(len(visible))]), width)
        top = min(max(y - int(rng.integers(h)), 0), height - h)
        start = min(max(x - int(rng.integers(w)), 0), width - w)
        block = mask[top : top + h, start : start + w]  # a view: writing to it writes to the mask
        rows, columns = np.nonzero(~block)
        block[rows[:left], columns[:left]] = True
        left -= min(left, len(rows))
    return flat
