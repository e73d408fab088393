"""From a decoded image to what the model sees: geometry in the worker (uint8), colour on the device (float).

worker:  crop(image, rng, ...) -> Crops -> Item -> collate -> Batch
device:  render(batch) -> Views
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from torch import Tensor

from hybridssl import colour
from hybridssl.errors import UserError
from hybridssl.masks import draw_left_out, draw_mask, mask_counts
from hybridssl.types import Batch, Views
from hybridssl.view_options import ViewOptions

# One process a core is the loader's job. OpenCV's own threads would fight the other workers for the same cores, and
# a pool that a forked worker inherits can hang it.
cv2.setNumThreads(0)


@dataclass(frozen=True)
class Crops:
    """All views of one image, as a worker makes them."""

    global_: np.ndarray  # uint8 [2, C, G, G]
    local: np.ndarray  # uint8 [L, C, g, g]
    clean: np.ndarray | None  # uint8 [C, G, G]
    colour: np.ndarray  # float32 [2 + L, Q]; the layout is in colour.py
    masks: np.ndarray  # bool [2, P]
    left_out: np.ndarray | None  # bool [2, P]


@dataclass(frozen=True)
class Item:
    """One sample on its way to `collate`."""

    crops: Crops
    labels: np.ndarray  # uint8 [K] multi-hot; all zero when there is no label
    source: int = -1
    labelled: bool = False
    text: str = ""
    key: str = ""
    bad: list[dict] = field(default_factory=list)  # samples that did not decode, and for which this one stands in
    meta: tuple[float, ...] = ()  # one value a column of `Batch.meta`


def generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The source of every draw for one sample: a function of three numbers, so no state is saved and none is lost."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, sample))))


def crop(
    image: np.ndarray,
    rng: np.random.Generator,
    options: ViewOptions,
    patch: int,
    position: int,
    clean: bool = True,
) -> Crops:
    """All views of `image`, uint8 [H, W, C]. `position` in the stream decides how many patches are masked."""
    height, width, channels = image.shape
    grid = options.grid(patch)

    def view(scale: tuple[float, float], size: int) -> np.ndarray:
        top, left, h, w = draw_box(rng, height, width, scale, options.aspect)
        return flip(resize(image[top : top + h, left : left + w], size), rng, options)

    large = [view(options.global_scale, options.global_size) for _ in range(2)]
    small = [view(options.local_scale, options.local_size) for _ in range(options.local_count)]
    global_, local = planes(large, options.global_size, channels), planes(small, options.local_size, channels)
    parameters = colour.draw(rng, np.concatenate([channel_means(global_), channel_means(local)]), options)
    counts = mask_counts(position, grid[0] * grid[1], options.mask_probability, options.mask_ratio)
    masks = np.stack([draw_mask(rng, grid, count, options.mask_shape) for count in counts])
    mild = left_out = None
    if clean:  # drawn last, so that asking for it changes no other view
        top, left, side = draw_clean_box(rng, height, width, options.clean_scale)
        square = image[top : top + side, left : left + side]
        mild = planes([flip(resize(square, options.global_size), rng, options)], options.global_size, channels)[0]
    if options.left_out:  # likewise
        left_out = np.stack([draw_left_out(rng, grid, 0 if count else options.left_out) for count in counts])
    return Crops(global_=global_, local=local, clean=mild, colour=parameters, masks=masks, left_out=left_out)


def draw_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, with the geometry of torchvision's RandomResizedCrop."""
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = max(min(width, round(height * aspect[1])), 1)  # a very long image: the largest centred crop in range
    h = max(min(height, round(width / aspect[0])), 1)
    return (height - h) // 2, (width - w) // 2, h, w


def draw_clean_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> tuple[int, int, int]:
    """(top, left, side) of a square inside the centred square: labels are learnt on what evaluation will see."""
    short = min(height, width)
    side = max(round(short * math.sqrt(rng.uniform(*scale))), 1)
    slack = short - side + 1
    return (height - short) // 2 + int(rng.integers(slack)), (width - short) // 2 + int(rng.integers(slack)), side


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [h, w, C] -> [size, size, C]: area-averaged halvings, then a matched low-pass and linear; cubic up.

    OpenCV's INTER_AREA is slow at odd factors (5 ms from 1024 px, against 0.9 ms) and refuses more than 4 channels.
    Halving by linear interpolation is the exact mean of 2 x 2, which OpenCV does fast; an odd last row or column goes.
    """
    channels = image.shape[2]
    while min(image.shape[:2]) >= 2 * size:
        h, w = image.shape[0] // 2, image.shape[1] // 2
        image = cv2.resize(image[: 2 * h, : 2 * w], (w, h), interpolation=cv2.INTER_LINEAR)
    factors = [side / size for side in image.shape[:2]]  # 1..2 or less than 1; a little more where the box is no square
    if max(factors) > 1:
        sigmas = [_low_pass(f) for f in factors]
        image = cv2.GaussianBlur(image, (3, 3), sigmaX=sigmas[1], sigmaY=sigmas[0])
    how = cv2.INTER_CUBIC if max(factors) < 1 else cv2.INTER_LINEAR
    return cv2.resize(image, (size, size), interpolation=how).reshape(size, size, channels)


def _low_pass(factor: float) -> float:
    """The sigma whose sampled three taps are (w, 1 - 2w, w) with w = (factor - 1) / 4: nothing at 1, binomial at 2."""
    w = min(max(factor - 1, 1e-6), 1.0) / 4
    return 1 / math.sqrt(2 * math.log((1 - 2 * w) / w))


def flip(image: np.ndarray, rng: np.random.Generator, options: ViewOptions) -> np.ndarray:
    """[h, w, C] -> the same, flipped or not; a view, nothing is copied."""
    across, down = rng.random(2) < (options.hflip, options.vflip)
    return image[:: -1 if down else 1, :: -1 if across else 1]


def channel_means(views: np.ndarray) -> np.ndarray:
    """uint8 [V, C, s, s] -> [V, C] in 0..1."""
    v, c, height, width = views.shape
    return views.reshape(v, c, height * width).sum(-1, dtype=np.uint32) / (255 * height * width)


def planes(images: Sequence[np.ndarray], size: int, channels: int) -> np.ndarray:
    """V images [size, size, C] -> [V, C, size, size]."""
    out = np.empty((len(images), channels, size, size), np.uint8)
    for row, image in zip(out, images, strict=True):
        row[:] = image.transpose(2, 0, 1)
    return out


def collate(items: Sequence[Item]) -> Batch:
    """B items -> Batch, views outermost. Runs in the worker."""
    crops = [item.crops for item in items]
    mild = [(i, c.clean) for i, c in enumerate(crops) if c.clean is not None]
    left_out = [c.left_out for c in crops if c.left_out is not None]
    stack = np.stack([view for _, view in mild]) if mild else np.zeros((0, *crops[0].global_.shape[1:]), np.uint8)
    return Batch(
        global_=torch.from_numpy(np.stack([c.global_ for c in crops], 1)),
        local=torch.from_numpy(np.stack([c.local for c in crops], 1)),
        clean=torch.from_numpy(stack),
        colour=torch.from_numpy(np.stack([c.colour for c in crops], 1)),
        masks=torch.from_numpy(np.stack([c.masks for c in crops], 1)),
        left_out=torch.from_numpy(np.stack(left_out, 1)) if left_out else None,
        labels=torch.from_numpy(np.stack([item.labels for item in items])),
        source=torch.tensor([item.source for item in items], dtype=torch.int64),
        labelled=torch.tensor([item.labelled for item in items], dtype=torch.bool),
        clean_of=torch.tensor([i for i, _ in mild], dtype=torch.int64),
        meta=torch.tensor([item.meta for item in items], dtype=torch.float32) if items[0].meta else None,
        text=[item.text for item in items],
        keys=[item.key for item in items],
        bad=[entry for item in items for entry in item.bad],
    ).counted()


@torch.no_grad()
def render(batch: Batch, options: ViewOptions) -> Views:
    """The batch as the model sees it, float32, on the batch's device: colour, clamp, blur, solarise, normalise."""
    with torch.autocast(batch.global_.device.type, enabled=False):  # bfloat16 has fewer levels than a photograph

        def coloured(crops: Tensor, parameters: Tensor) -> Tensor:  # [V, B, C, s, s], [V, B, Q] -> [V * B, C, s, s]
            images = colour.apply(crops.flatten(0, 1), parameters.flatten(0, 1), options.blur_sigma[1])
            return standardise(images, options.mean, options.std)

        return Views(
            global_=coloured(batch.global_, batch.colour[:2]),
            local=coloured(batch.local, batch.colour[2:]) if len(batch.local) else None,
            clean=normalise(batch.clean, options.mean, options.std) if len(batch.clean) else None,
        )


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [N, C, H, W] -> float32, (x / 255 - mean) / std."""
    return standardise(images.float().div_(255), mean, std)


def standardise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """In place: (images [N, C, H, W] - mean) / std. UserError when the statistics do not fit the channels."""
    channels = images.shape[1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise UserError(
                f"views.{name} has {len(values)} numbers, the images {channels} channels: set as many, or 1"
            )
    for c in range(channels):  # numbers rather than tensors: nothing to copy to the device
        images[:, c].sub_(mean[c % len(mean)]).div_(std[c % len(std)])
    return images


def resize_for_eval(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, C] -> [C, size, size]: short side to `size`, centred square. Every evaluation uses it."""
    height, width, channels = image.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    return planes([resize(image[top : top + short, left : left + short], size)], size, channels)[0]
