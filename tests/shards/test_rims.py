"""Frames and rings are seen; lesions, bright or dark backgrounds are not taken for them."""

from __future__ import annotations

import numpy as np
import pytest

from shards.hashes import thumbnail
from shards.rims import rim


def skin(height: int = 150, width: int = 200) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (170 + rng.normal(0, 12, (height, width, 3))).clip(0, 255).astype(np.uint8)


def judged(image: np.ndarray) -> str:
    return rim(thumbnail(image), *image.shape[:2])


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("thick", [6, 20])
def test_a_frame_on_all_sides_or_on_two(level: int, thick: int) -> None:
    image = skin()
    image[:thick] = image[-thick:] = level
    assert judged(image) == "frame"
    image[:, :thick] = image[:, -thick:] = level
    assert judged(image) == "frame"


@pytest.mark.parametrize("radius", [0.45, 0.55])
def test_a_ring(radius: float) -> None:
    image = skin()
    y, x = np.mgrid[:150, :200]
    image[np.hypot(y - 75, x - 100) > radius * 200] = 3
    assert judged(image) == "ring"


def test_none_on_skin_a_dark_lesion_or_a_dark_field() -> None:
    assert judged(skin()) == ""
    image = skin()
    y, x = np.mgrid[:150, :200]
    image[np.hypot(y - 75, x - 100) < 50] = 20
    assert judged(image) == ""
    dark = np.full((150, 200, 3), 8, np.uint8)  # microscopy: bright cells on black
    for n in range(12):
        dark[np.hypot(y - 20 - 9 * n, x - 30 - 11 * (n * 7 % 13)) < 9] = 140
    assert judged(dark) == ""


def test_one_dark_side_is_no_frame() -> None:
    image = skin()
    image[:20] = 0
    assert judged(image) == ""
