"""What one sample is, how its members are named in a tar, and how its bytes become pixels."""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from shards.errors import DataError

FORMAT = "hybridssl-shards"
VERSION = 1
CREATED_BY = "hybridssl 0.1.0"
SPLITS = ("", "train", "val", "test")  # every index starts with these; "" is a sample without a split
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff")
PICKLED = frozenset({"pyd", "pickle", "pkl", "pt", "pth"})  # reading one of these runs whatever code it holds
MAX_CHANNELS = 512
MAX_PIXELS = 200_000_000  # times channels, beyond three
_MAX_SAMPLE_VALUE = 281  # TIFF tag


@dataclass(frozen=True)
class Sample:
    """One image as it lies in a shard, with all that is known about it."""

    key: str
    image: bytes
    labels: tuple[str, ...] = ()  # empty: unlabelled
    source: str = ""
    group: str = ""  # the patient or lesion: never on both sides of a split
    split: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    mask: bytes | None = None
    text: str | None = None


def hash64(data: bytes) -> int:
    """A signed 64-bit blake2b; never 0, which stands for "none" in the index."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True) or 1


def extension(data: bytes) -> str:
    """`jpg`, `png`, `webp` or `tif` by the first bytes, whatever the file is called. DataError for anything else."""
    if data[:2] == b"\xff\xd8":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "tif"
    raise DataError(f"not a JPEG, PNG, WebP or TIFF image: {len(data):,} bytes that start with {bytes(data[:8])!r}")


def decode(data: bytes, at_least: int = 0, channels: int = 3) -> np.ndarray:
    """Decode to uint8 [H, W, channels], upright (EXIF): RGB or grey, or with another number of `channels` all planes.

    A JPEG comes at the smallest of the scales 1, 1/2, 1/4, 1/8 whose short side is still >= `at_least` pixels
    (0: full size); libjpeg's scales in between cost more than a full decode. Raises DataError with the reason.
    """
    kind = extension(data)
    if kind == "jpg" and channels in (1, 3):
        try:
            return _decode_jpeg(data, at_least, channels)
        except ValueError:
            pass  # CMYK, or stray bytes between markers: Pillow reads what is readable and names what is not
    image = _open(data)
    if (pages := _pages(image, data)) > 1 or channels not in (1, 3):
        return _decode_planes(image, data, channels, pages)
    return photograph(_loaded(image, data), channels, top_value(image, data))


def _decode_jpeg(data: bytes, at_least: int, channels: int) -> np.ndarray:
    height, width = (int(side) for side in simplejpeg.decode_jpeg_header(data)[:2])  # type: ignore[arg-type]
    bound(width, height)
    factor = 1
    while at_least and factor < 8 and -(-min(height, width) // (2 * factor)) >= at_least:
        factor *= 2
    image = simplejpeg.decode_jpeg(
        data, "RGB" if channels == 3 else "GRAY", min_height=-(-height // factor), min_width=-(-width // factor)
    )
    start = data.find(b"Exif\x00\x00", 0, 1 << 16)  # opening an image in Pillow costs more than looking first
    return image if start < 0 else _upright(image, data)


def _upright(image: np.ndarray, data: bytes) -> np.ndarray:
    try:
        orientation = Image.open(io.BytesIO(data), formats=("JPEG",)).getexif().get(0x0112, 1)
    except Exception:  # a broken EXIF block is no reason to lose the image
        return image
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def photograph(image: Image.Image, channels: int, top: int = 0) -> np.ndarray:
    """A loaded image as uint8 [H, W, channels], 1 (grey) or 3 (RGB). `top`: as for `_eight_bits`."""
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_eight_bits(np.asarray(image), top)[..., None], channels, axis=2)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")  # what lies under a transparent pixel is arbitrary: show black there
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    array = np.array(image.convert("RGB" if channels == 3 else "L"))
    return array.reshape(*array.shape[:2], channels)


def _decode_planes(image: Image.Image, data: bytes, channels: int, pages: int) -> np.ndarray:
    """An image whose pages, or bands, are its channels: uint8 [H, W, channels]."""
    planes = pages * len(image.getbands())
    if planes != channels:
        raise DataError(f"an image of {planes} planes where {channels} channels are wanted: build with --channels")
    parts, tops = [], []
    for page in range(pages):
        try:
            image.seek(page)
        except Exception as error:
            raise _damaged(data, error) from None
        bound(*image.size, planes)
        part = np.asarray(_loaded(image, data))
        parts.append(part.reshape(*part.shape[:2], -1))
        tops.append(top_value(image, data) or (255 if part.dtype == np.uint8 else 0))
        if parts[-1].shape != parts[0].shape:
            raise DataError(f"pages {parts[0].shape} and {parts[-1].shape} do not make one image")
    values = np.concatenate(parts, axis=2)
    return values if values.dtype == np.uint8 else _eight_bits(values, max(tops))


def short_side(data: bytes) -> int:
    """Of an image as it is stored, in pixels; nothing but its header is read. DataError when it is damaged."""
    if extension(data) == "jpg":
        with suppress(ValueError):  # as in `decode`
            return min(simplejpeg.decode_jpeg_header(data)[:2])  # type: ignore[type-var]
    return min(_open(data).size)


def decode_mask(data: bytes) -> np.ndarray:
    """Decode a mask to bool [H, W]: True wherever a value is not 0 (so instance numbers count as foreground)."""
    return mask_values(data) > 0


def mask_values(data: bytes) -> np.ndarray:
    """Decode a mask to its numbers [H, W]: instances or classes, as they were drawn."""
    image = _loaded(_open(data), data)
    if image.mode in ("RGB", "RGBA", "LA", "CMYK", "YCbCr"):
        image = image.convert("L")
    return np.asarray(image)  # modes 1, L, P (palette indices), I and I;16 as they are


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "TIFF"))
        bound(*image.size)
        return image
    except DataError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        raise _damaged(data, error) from None


def _pages(image: Image.Image, data: bytes) -> int:
    try:
        return image.n_frames if image.format == "TIFF" else 1  # type: ignore[attr-defined]
    except Exception as error:
        raise _damaged(data, error) from None


def _loaded(image: Image.Image, data: bytes) -> Image.Image:
    """Decoded and upright."""
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:
        raise _damaged(data, error) from None


def _damaged(data: bytes, error: Exception) -> DataError:
    reason = str(error) or type(error).__name__
    return DataError(f"damaged {extension(data)} image ({len(data):,} bytes): {reason}")


def bound(width: int, height: int, planes: int = 1) -> None:
    if width * height * max(planes, 3) > 3 * MAX_PIXELS:
        what = f"{width:,} x {height:,} pixels" + (f" in {planes} planes" if planes > 3 else "")
        raise DataError(f"{what} are more than the {MAX_PIXELS:,} that are decoded: cut it up")


def top_value(image: Image.Image, data: bytes) -> int:
    """The largest value that a 16-bit image could have, where its file says so; else 0."""
    if image.format == "PNG":  # significant bits: by the standard, values are then scaled to the full range
        return 65535 if data.find(b"sBIT", 0, max(data.find(b"IDAT"), 0)) > 0 else 0
    values = getattr(image, "tag_v2", {}).get(_MAX_SAMPLE_VALUE, 0)
    value = values[0] if isinstance(values, tuple) and values else values
    return value if isinstance(value, int) else 0


def _eight_bits(values: np.ndarray, top: int = 0) -> np.ndarray:
    """16 bits to 8. Where the largest value that there could be is unknown (`top` 0), the largest that is there says
    how many bits count: 12-bit data (most X-rays) keeps its full range, 8-bit data in a wide file its values."""
    values = np.clip(values.astype(np.int64), 0, 65535)
    top = top or int(values.max(initial=0))
    shift = 0 if top < 256 else 4 if top < 4096 else 8
    return (values >> shift).astype(np.uint8)
