"""What goes wrong with photographs in another hospital, in five severities, as a function and not as a process.

The form is ImageNet-C's (Hendrycks & Dietterich 2019, arXiv 1903.12261, section 4 and appendix B): every corruption has
five severities, for a classifier that never saw it. Blur, noise and JPEG have its strengths; colour cast, hair, ruler
and exposure stand for its weather and lighting, as a skin clinic has them.

- All strengths are those at 224 pixels a side, as there; a smaller or larger image is corrupted like the same
  photograph at that size, so backbones of different input sizes meet the same test.
- A sample's draw depends on the corruption and the sample's number, not on the severity: severity 3 has the hairs of
  severity 2 and more. So a curve over severities shows the strength alone.
- The strands and ticks of the demo (`shards.draw`) serve another end: how many there are is part of their draw, so they
  do not nest, and their width is whole pixels of the image. Here a fixed canvas is drawn on and averaged down.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np

from finetune.features import ImageChange

Array = np.ndarray
SEVERITIES = (1, 2, 3, 4, 5)
REFERENCE = 224  # pixels a side, at which the strengths hold
CANVAS = 448  # pixels a side, on which hair and ruler are drawn
VERSION = 1  # raise it when a corruption changes: features are kept under its name

BLUR = (1, 2, 3, 4, 6)  # deviation of the Gaussian, pixels
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # deviation, of the full range
JPEG = (25, 18, 15, 10, 7)  # quality
COLOUR = (0.06, 0.12, 0.18, 0.26, 0.36)  # length of the vector of log gains of the channels
HAIR = (3, 6, 10, 16, 24)  # strands
RULER = (0.04, 0.07, 0.10, 0.14, 0.18)  # length of the short ticks, of the side
EXPOSURE = (0.3, 0.6, 1.0, 1.4, 1.8)  # stops
GAMMA = 2.2  # about that of sRGB: exposure works on light, not on pixel values


def change(name: str, severity: int) -> ImageChange:
    """The corruption `name` of NAMES at `severity` 1..5, for `features.extract`."""
    return ImageChange(f"{name} {severity} (corruptions v{VERSION})", partial(_apply, name, severity))


def corrupt(image: Array, name: str, severity: int, number: int) -> Array:
    """uint8 [C, S, S] -> the same, corrupted; a pure function of its arguments. number: of the sample in its index."""
    return _apply(name, severity, image, number)


def names(channels: int) -> list[str]:
    """The corruptions that images of so many channels can have: a cast needs colours."""
    return [name for name in NAMES if channels > 1 or name != "colour"]


def _apply(name: str, severity: int, image: Array, number: int) -> Array:
    rng = np.random.default_rng([zlib.crc32(name.encode()), number])
    found = NAMES[name](image.transpose(1, 2, 0).astype(np.float32), severity - 1, rng)
    return np.clip(np.round(found), 0, 255).astype(np.uint8).transpose(2, 0, 1)


# -- each: float32 [S, S, C] in 0..255, level 0..4, the sample's generator -> float32 [S, S, C], not yet clipped -------


def _blur(image: Array, level: int, rng: np.random.Generator) -> Array:
    """Out of focus."""
    sigma = BLUR[level] * len(image) / REFERENCE
    return _deep(cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101))


def _noise(image: Array, level: int, rng: np.random.Generator) -> Array:
    """A dark room and a small sensor: Gaussian, independent in pixels and channels."""
    field = rng.standard_normal((REFERENCE, REFERENCE, image.shape[2]), np.float32)
    return image + NOISE[level] * 255 * _resized(field, len(image))


def _jpeg(image: Array, level: int, rng: np.random.Generator) -> Array:
    """Sent by a messenger. What compression changes at 224 pixels is added, so a larger image keeps its detail."""
    before = np.clip(np.round(_resized(image, REFERENCE)), 0, 255).astype(np.uint8)
    layers = [before] if before.shape[2] == 3 else np.split(before, before.shape[2], axis=2)
    after = np.concatenate([_through_jpeg(layer, JPEG[level]) for layer in layers], axis=2)
    return image + _resized(after.astype(np.float32) - before, len(image))


def _colour(image: Array, level: int, rng: np.random.Generator) -> Array:
    """Another lamp or white balance: a gain for each channel, their logarithms in a random direction of zero sum."""
    direction = rng.standard_normal(image.shape[2])
    direction -= direction.mean()
    return image * np.exp(COLOUR[level] * direction / np.linalg.norm(direction)).astype(np.float32)


def _hair(image: Array, level: int, rng: np.random.Generator) -> Array:
    """Dark strands across the image: mostly combed one way, slightly bent."""
    layer, lean = np.zeros((CANVAS, CANVAS), np.uint8), rng.uniform(0, np.pi)
    along = np.linspace(-1, 1, 24)[:, None]
    for _ in range(HAIR[level]):
        angle, middle = lean + rng.normal(0, 0.35), rng.uniform(0, 1, 2)
        reach, bend, width = rng.uniform(0.3, 0.7), rng.normal(0, 0.12), int(rng.integers(2, 5))
        ahead, aside = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        path = (middle + along * reach * ahead + along**2 * bend * aside) * CANVAS
        cv2.polylines(layer, [np.round(path * 16).astype(np.int32)], False, 255, width, cv2.LINE_AA, 4)
    return _darkened(image, layer)


def _ruler(image: Array, level: int, rng: np.random.Generator) -> Array:
    """The ticks of a scale along one edge, every fifth longer."""
    layer = np.zeros((CANVAS, CANVAS), np.uint8)
    step, start = CANVAS * rng.uniform(0.045, 0.075), rng.uniform(0, CANVAS * 0.045)
    for i in range(int((CANVAS - start) / step) + 1):
        x, length = round(start + i * step), round(RULER[level] * CANVAS * (1 if i % 5 else 1.8))
        cv2.rectangle(layer, (x - 2, 0), (x + 1, length), 255, -1)
    return _darkened(image, np.rot90(layer, int(rng.integers(4))))


def _exposure(image: Array, level: int, rng: np.random.Generator) -> Array:
    """Too much light or too little, by the toss of a coin."""
    return image * np.float32(2 ** (rng.choice([-1, 1]) * EXPOSURE[level] / GAMMA))


NAMES: dict[str, Callable[[Array, int, np.random.Generator], Array]] = {
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
    "colour": _colour,
    "hair": _hair,
    "ruler": _ruler,
    "exposure": _exposure,
}


def _resized(image: Array, size: int) -> Array:
    """[S, S, C] -> [size, size, C]: averaged down, interpolated up."""
    way = cv2.INTER_AREA if size < len(image) else cv2.INTER_LINEAR
    planes = [cv2.resize(image[..., c], (size, size), interpolation=way) for c in range(image.shape[2])]
    return np.stack(planes, axis=2)  # a channel at a time: OpenCV averages four at most


def _deep(image: Array) -> Array:
    """OpenCV drops a single channel; give it back."""
    return image if image.ndim == 3 else image[..., None]


def _through_jpeg(image: Array, quality: int) -> Array:
    """uint8 [S, S, 1 or 3] -> what a JPEG file of it gives back."""
    flipped = np.ascontiguousarray(image[..., ::-1])  # OpenCV's files are BGR
    _, data = cv2.imencode(".jpg", flipped, [cv2.IMWRITE_JPEG_QUALITY, quality])
    back = np.asarray(cv2.imdecode(data, cv2.IMREAD_UNCHANGED))
    return _deep(back)[..., ::-1]


def _darkened(image: Array, layer: Array) -> Array:
    """The image with 85 % of the light gone where the canvas `layer` is 255."""
    cover = _resized(np.ascontiguousarray(layer, np.float32)[..., None] / 255, len(image))
    return image * (1 - 0.85 * cover)
