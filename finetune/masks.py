"""Masks on the grid that is evaluated, how two of them overlap, and how they are kept as bits.

A mask is uint8 [S, S]: 0 is background, k the k-th class. Overlap is counted once, as pixels [N, K, 3] (in both, in the
prediction only, in the truth only); IoU and Dice follow from the counts, image by image or pooled over all pixels. An
image in which neither truth nor prediction has the class says nothing about it and is left out of that class's mean (so
does torchmetrics); one with a false alarm counts 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from finetune.metrics import Metric
from hybridssl.views import resize_for_eval
from shards.errors import DataError
from shards.format import decode, decode_mask, mask_values
from shards.index import Index

Array = np.ndarray
FOREGROUND = ("foreground",)


# -- reading ----------------------------------------------------------------------------------------------------------


def with_mask(index: Index) -> Array:
    """bool [N]: which samples have a mask."""
    return np.asarray(index.column("mask")[:, 0]) != 0


def on_grid(data: bytes, size: int, classes: Sequence[str] = FOREGROUND) -> Array:
    """An encoded mask -> uint8 [size, size], cut to the centred square like the image and resized with nearest.

    With one class every value but 0 is foreground, instance numbers too; with several, value k is the k-th of them.
    DataError for a damaged file, or a value that has no name.
    """
    if len(classes) == 1:
        values = decode_mask(data).astype(np.uint8)
    else:
        values = mask_values(data)
        if values.max(initial=0) > len(classes):
            raise DataError(f"its mask has the value {values.max()}, and only {len(classes)} mask classes are named")
        values = values.astype(np.uint8)
    height, width = values.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = values[top : top + short, left : left + short]
    return cv2.resize(square, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)


def read_pair(index: Index, number: int, size: int, classes: Sequence[str] = FOREGROUND) -> tuple[Array, Array]:
    """(image uint8 [C, size, size], mask uint8 [size, size]) of one sample. DataError when either cannot be had."""
    sample = index.read(number)
    if sample.mask is None:
        raise DataError("it has no mask")
    image = decode(sample.image, size, index.channels)
    shape = mask_values(sample.mask).shape
    if abs(shape[0] * image.shape[1] - shape[1] * image.shape[0]) > max(image.shape[:2]) + max(shape):
        raise DataError(f"its mask is {shape[1]} x {shape[0]}, which is no mask of an image of another shape")
    return resize_for_eval(image, size), on_grid(sample.mask, size, classes)


class Pairs(torch.utils.data.Dataset):
    """number -> (number, image, mask) or (number, None, reason)."""

    def __init__(self, index: Index, numbers: Array, size: int, classes: Sequence[str] = FOREGROUND) -> None:
        self.index, self.numbers, self.size, self.classes = index, numbers, size, classes

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: int) -> tuple[int, Array | None, Array | str]:
        number = int(self.numbers[at])
        try:
            return number, *read_pair(self.index, number, self.size, self.classes)
        except DataError as error:
            return number, None, str(error)


# -- overlap ----------------------------------------------------------------------------------------------------------


def overlap(truth: Array, found: Array, classes: int = 1) -> Array:
    """uint8 [N, S, S] twice -> int64 [N, K, 3]: pixels of each class in both, in `found` only, in `truth` only."""
    counts = np.zeros((len(truth), classes, 3), dtype=np.int64)
    for k in range(classes):
        a, b = truth == k + 1, found == k + 1
        both = (a & b).sum((1, 2))
        counts[:, k] = np.stack([both, b.sum((1, 2)) - both, a.sum((1, 2)) - both], axis=1)
    return counts


def iou(counts: Array) -> Array:
    """[..., 3] -> [...]: pixels in both over pixels in either; NaN where there are none."""
    return _share(counts[..., 0], counts.sum(-1))


def dice(counts: Array) -> Array:
    """[..., 3] -> [...]: twice the pixels in both over the sum of the two areas; NaN where that is 0."""
    return _share(2 * counts[..., 0], counts.sum(-1) + counts[..., 0])


def mean_known(values: Array) -> Array:
    """[N, K] -> [N]: the mean over what is not NaN; NaN where all is."""
    there = ~np.isnan(values)
    return _share(np.where(there, values, 0).sum(1), there.sum(1))


def _share(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def overlap_metrics(classes: Sequence[str]) -> dict[str, Metric]:
    """Metrics for `metrics.bootstrap`, whose `scores` are the counts as [N, K * 3] and whose `y` is not looked at.

    `iou` and `dice` are means over images, then over classes; `*_pooled` are of all pixels together, so that large
    objects count more. With several classes each gets its own line as well.
    """
    shares = {"iou": iou, "dice": dice}
    found = {name: Overlap(share, False) for name, share in shares.items()}
    found |= {f"{name}_pooled": Overlap(share, True) for name, share in shares.items()}
    if len(classes) > 1:
        found |= {f"{n}_{c}": Overlap(s, False, k) for n, s in shares.items() for k, c in enumerate(classes)}
    return dict(found)


@dataclass(frozen=True)
class Overlap:
    """One metric: counts [N, K * 3] and image weights [R, N] -> [R]. only: of one class, in place of the mean."""

    share: Callable[[Array], Array]
    pooled: bool
    only: int | None = None

    def __call__(self, y: Array, counts: Array, weight: Array) -> Array:
        counts = counts.reshape(len(counts), -1, 3)
        if self.only is not None:
            counts = counts[:, self.only : self.only + 1]
        if self.pooled:
            each = self.share(np.tensordot(weight, counts, 1))  # [R, K]
        else:
            values = self.share(counts)  # [N, K]
            there = ~np.isnan(values)
            each = _share(weight @ np.where(there, values, 0), weight @ there)
        return mean_known(each)


def mean_iou(counts: Array) -> float:
    """`iou` of counts [N, K, 3] as they are; what val chooses by."""
    return float(Overlap(iou, False)(counts, counts, np.ones((1, len(counts))))[0])


# -- keeping ----------------------------------------------------------------------------------------------------------


def pack(masks: Array, classes: int = 1) -> Array:
    """uint8 [..., S, S] -> bits uint8 [..., K, ceil(S * S / 8)], one plane a class."""
    planes = np.stack([masks == k + 1 for k in range(classes)], axis=-3)
    return np.packbits(planes.reshape(*planes.shape[:-2], -1), axis=-1)


def unpack(bits: Array, size: int) -> Array:
    """What `pack` made -> uint8 [..., size, size]."""
    planes = np.unpackbits(bits, axis=-1, count=size * size).reshape(*bits.shape[:-1], size, size)
    names = np.arange(1, planes.shape[-3] + 1, dtype=np.uint8)[:, None, None]
    return (planes * names).max(-3)
