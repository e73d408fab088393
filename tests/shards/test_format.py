from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from shards.errors import DataError
from shards.format import decode, decode_mask


def encoded(array: np.ndarray, kind: str, mode: str | None = None, **options: object) -> bytes:
    image = Image.fromarray(array)
    image = image.convert(mode) if mode else image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(height: int = 40, width: int = 60) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 90)], -1).astype(np.uint8)


FILES = "JPEG RGB, JPEG L, JPEG CMYK, PNG RGB, PNG L, PNG P, PNG RGBA, WEBP RGB, WEBP RGBA"


@pytest.mark.parametrize(("kind", "mode"), [tuple(file.split()) for file in FILES.split(", ")])
def test_every_mode_comes_as_rgb(kind: str, mode: str) -> None:
    options = {"quality": 95, "lossless": True}
    image = decode(encoded(smooth(), kind, mode, **options))
    expected = np.asarray(Image.fromarray(smooth()).convert(mode).convert("RGB"))
    assert image.shape == (40, 60, 3)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - expected).mean() < (6 if kind == "JPEG" else 0.1)
    assert decode(encoded(smooth(), kind, mode, **options), channels=1).shape == (40, 60, 1)


@pytest.mark.parametrize(("top", "shift"), [(200, 0), (4095, 4), (65535, 8)])
def test_16_bit_grey_keeps_its_range(top: int, shift: int) -> None:
    values = np.linspace(0, top, 40 * 60).reshape(40, 60).astype(np.uint16)
    image = decode(encoded(values, "PNG"))
    assert np.array_equal(image, np.repeat((values >> shift).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(), "JPEG", quality=95, subsampling=0, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.abs(decode(data).astype(int) - expected).max() < 8
    assert decode(data, at_least=10).shape[:2] == tuple(side // 4 for side in expected.shape[:2])


@pytest.mark.parametrize(
    ("at_least", "expected"), [(0, 100), (100, 100), (51, 100), (50, 50), (13, 13), (1, 13), (999, 100)]
)
def test_scaled_decode_is_the_smallest_that_is_large_enough(at_least: int, expected: int) -> None:
    data = encoded(smooth(100, 140), "JPEG")
    assert min(decode(data, at_least).shape[:2]) == expected


def test_transparent_pixels_are_black() -> None:
    rgba = np.dstack([smooth(), np.zeros((40, 60), np.uint8)])
    assert not decode(encoded(rgba, "PNG")).any()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a JPEG, PNG, WebP or TIFF image: 0 bytes"),
        (b"GIF89a" + bytes(20), "not a JPEG, PNG, WebP or TIFF"),
        (b"\xff\xd8\xff", "damaged jpg image"),
        (encoded(smooth(), "JPEG")[:400], "damaged jpg image"),
        (encoded(smooth(), "PNG")[:100], "damaged png image"),
        (encoded(smooth(), "WEBP")[:100], "damaged webp image"),
    ],
)
def test_damage_is_named(data: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        decode(data)


def test_pixels_are_bounded_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.format.MAX_PIXELS", 2000)
    for kind in ("JPEG", "PNG"):
        with pytest.raises(DataError, match=r"60 x 40 pixels are more than the 2,000"):
            decode(encoded(smooth(), kind))


def test_masks_are_bool_whatever_their_mode() -> None:
    instance = np.zeros((9, 9), np.uint16)
    instance[2:4], instance[6:8] = 1, 300
    for values in (instance, (instance > 0).astype(np.uint8), (instance > 0)):
        assert np.array_equal(decode_mask(encoded(values, "PNG")), instance > 0)
