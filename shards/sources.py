"""From the bytes of an image file to frames: arrays with all their bits and channels, whatever the format.

Photographs here; every other format has a file of its own (readers.py).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from shards.errors import DataError
from shards.format import bound, photograph, top_value

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp")
_SAMPLES_PER_PIXEL = 277  # TIFF tag


@dataclass(frozen=True)
class Frame:
    """One frame of a file."""

    pixels: np.ndarray  # uint8 or uint16 [H, W, C], upright
    full: bool = False  # whether 16-bit values are scaled to 0..65535, so that their size says nothing about their bits


@dataclass(frozen=True)
class Opened:
    """What a reader (readers.py) finds in a file."""

    frames: Iterator[tuple[int, int, Frame]]  # number, how many there are, frame
    group: str = ""  # the patient, hashed; "": the file does not say
    meta: dict[str, Any] = field(default_factory=dict)  # to be kept; nothing that says who it is


def frames(data: bytes, channels: int, wanted: int = 0, bits: int = 0) -> Iterator[tuple[int, int, Frame]]:
    """(number, how many there are, frame) of a JPEG, PNG, WebP, BMP or TIFF file; `wanted`: as in `choose`.

    With 1 or 3 `channels`, photographs come as grey or RGB; else all planes come as they are. What the user says of the
    `bits` of 16-bit images goes before what the file says. Raises DataError.
    """
    if not data:
        raise DataError("the file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "BMP", "TIFF"))
        planes = image.tag_v2.get(_SAMPLES_PER_PIXEL, 1) if image.format == "TIFF" else 1  # type: ignore[attr-defined]
        if planes <= len(image.getbands()):
            count = image.n_frames if image.format == "TIFF" else 1  # type: ignore[attr-defined]
            full = not bits and top_value(image, data) == 65535  # the first page speaks for all
            for number in choose(count, wanted):
                image.seek(number)
                bound(*image.size)
                yield number, count, _frame(ImageOps.exif_transpose(image), channels, full)
            return
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            raise DataError(f"{len(data):,} bytes that are no JPEG, PNG, WebP, BMP or TIFF") from None
    except Exception as error:  # Pillow raises many types on damaged files
        raise DataError(f"damaged image of {len(data):,} bytes: {error_name(error)}") from None
    yield from _multispectral(data, wanted)


def choose(count: int, wanted: int) -> list[int]:
    """Which of `count` frames: all (`wanted` 0), or at most so many, evenly spread from the middle of each part."""
    if not wanted or wanted >= count:
        return list(range(count))
    return [int((2 * i + 1) * count / (2 * wanted)) for i in range(wanted)]


def scaled(values: np.ndarray, low: float, high: float) -> Frame:
    """Any numbers [H, W, C] as 16 bits: `low` and less becomes 0, `high` and more 65535."""
    share = (values.astype(np.float64) - low) / max(high - low, 1e-12)
    return Frame(np.round(np.clip(share, 0, 1) * 65535).astype(np.uint16), full=True)


def fill_bits(frame: Frame, bits: int) -> Frame:
    """16-bit values of which only `bits` are used, scaled to all 16."""
    if not bits or frame.full or frame.pixels.dtype != np.uint16:
        return frame
    top = (1 << bits) - 1
    return Frame(np.minimum(frame.pixels, top) << np.uint16(16 - bits), full=True)


def error_name(error: BaseException) -> str:
    """What kind of error it was. Not its words, for those may quote the file."""
    return type(error).__name__


def _frame(image: Image.Image, channels: int, full: bool) -> Frame:
    if image.mode.startswith("I;16"):
        return Frame(np.asarray(image).astype(np.uint16)[..., None], full)
    if image.mode in ("I", "F"):
        return _numbers(np.asarray(image)[..., None])
    if channels in (1, 3):
        return Frame(photograph(image, channels))
    planes = np.asarray(image.convert("RGB") if image.mode in ("1", "P", "CMYK", "YCbCr", "LAB", "HSV") else image)
    return Frame(planes.reshape(*planes.shape[:2], -1))


def _numbers(values: np.ndarray) -> Frame:
    """Wide integers that fit into 16 bits as they are; others, and fractions, from the smallest to the largest."""
    values = np.nan_to_num(values) if values.dtype.kind == "f" else values
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        return Frame(values.astype(np.uint16))
    return scaled(values, low, high)


def _multispectral(data: bytes, wanted: int) -> Iterator[tuple[int, int, Frame]]:
    """TIFF with more planes a pixel than Pillow knows."""
    try:
        import tifffile
    except ModuleNotFoundError:
        raise DataError("a TIFF with so many planes needs tifffile: pip install 'hybridssl[tiff]'") from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            for number in choose(len(file.pages), wanted):
                page: Any = file.pages[number]
                bound(page.imagewidth, page.imagelength, page.samplesperpixel)
                values = page.asarray()
                if values.ndim == 3 and page.planarconfig == 2:  # a plane after the other
                    values = values.transpose(1, 2, 0)
                values = values.reshape(page.imagelength, page.imagewidth, -1)
                yield number, len(file.pages), Frame(values) if values.dtype == np.uint8 else _numbers(values)
    except DataError:
        raise
    except Exception as error:  # tifffile too
        hint = ": pip install 'hybridssl[tiff]'" if "imagecodecs" in str(error) else ""
        raise DataError(f"TIFF that cannot be read ({error_name(error)}){hint}") from None
