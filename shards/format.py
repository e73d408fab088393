"""What one sample is, how its members are named in a tar, and how its bytes become pixels."""

from __future__ import annotations

import io
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
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
PICKLED = frozenset({"pyd", "pickle", "pkl", "pt", "pth"})  # reading one of these runs whatever code it holds
MAX_PIXELS = 200_000_000


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
    """`jpg`, `png` or `webp` by the first bytes, whatever the file is called. DataError for anything else."""
    if data[:2] == b"\xff\xd8":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise DataError(f"not a JPEG, PNG or WebP image: {len(data):,} bytes that start with {bytes(data[:8])!r}")


def decode(data: bytes, at_least: int = 0, channels: int = 3) -> np.ndarray:
    """Decode to uint8 [H, W, channels], upright (EXIF), RGB or grey.

    A JPEG comes at the smallest of the scales 1, 1/2, 1/4, 1/8 whose short side is still >= `at_least` pixels
    (0: full size); libjpeg's scales in between cost more than a full decode. Raises DataError with the reason.
    """
    if channels not in (1, 3):
        raise DataError(f"images can be read with 1 or 3 channels, not {channels}")
    kind = extension(data)
    if kind == "jpg":
        try:
            return _decode_jpeg(data, at_least, channels)
        except ValueError:
            pass  # CMYK, or stray bytes between markers: Pillow reads what is readable and names what is not
    return _decode_pillow(data, channels)


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


def _decode_pillow(data: bytes, channels: int) -> np.ndarray:
    image = _open(data)
    if image.mode.startswith("I") or image.mode == "F":
        grey = _eight_bits(np.asarray(image))
        return np.repeat(grey[..., None], channels, axis=2)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")  # what lies under a transparent pixel is arbitrary: show black there
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    array = np.array(image.convert("RGB" if channels == 3 else "L"))
    return array.reshape(*array.shape[:2], channels)


def decode_mask(data: bytes) -> np.ndarray:
    """Decode a mask to bool [H, W]: True wherever a value is not 0 (so instance numbers count as foreground)."""
    return mask_values(data) > 0


def mask_values(data: bytes) -> np.ndarray:
    """Decode a mask to its numbers [H, W]: instances or classes, as they were drawn."""
    image = _open(data)
    if image.mode in ("RGB", "RGBA", "LA", "CMYK", "YCbCr"):
        image = image.convert("L")
    return np.asarray(image)  # modes 1, L, P (palette indices), I and I;16 as they are


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        bound(*image.size)
        image.load()
        return ImageOps.exif_transpose(image)
    except DataError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        reason = str(error) or type(error).__name__
        raise DataError(f"damaged {extension(data)} image ({len(data):,} bytes): {reason}") from None


def bound(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"{width:,} x {height:,} pixels are more than the {MAX_PIXELS:,} that are decoded: cut it up")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """16-bit grey to 8: 12-bit data (most X-rays) keeps its full range, 8-bit data in a wide file its values."""
    values = np.clip(values.astype(np.int64), 0, 65535)
    top = int(values.max(initial=0))
    shift = 0 if top < 256 else 4 if top < 4096 else 8
    return (values >> shift).astype(np.uint8)
