"""Measurements on shapes whose values geometry knows."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from scipy.special import ellipe

from finetune.measurements import (
    NAMES,
    asymmetry,
    diameter,
    irregularity,
    largest,
    measure,
    pixel_length,
    unit,
    variegation,
)
from hybridssl.errors import UserError


def polygon(*points: tuple[float, float], size: int = 320, turn: float = 0.0) -> np.ndarray:
    """bool [size, size]: the pixels whose centre lies in the polygon (x, y about the middle), turned by degrees."""
    angle = math.radians(turn)
    corners = np.array(points) @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    inside = np.zeros((size, size), dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) / (by - ay + 1e-12) * (bx - ax))
    return inside


def ellipse(a: float, b: float, size: int = 320, turn: float = 0.0) -> np.ndarray:
    angle = math.radians(turn)
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    return (u / a) ** 2 + (v / b) ** 2 <= 1


def square(side: int) -> np.ndarray:
    mask = np.zeros((320, 320), dtype=bool)
    mask[20 : 20 + side, 40 : 40 + side] = True
    return mask


@pytest.mark.parametrize("radius", [20, 60, 130])
def test_a_disc(radius):
    found = measure(ellipse(radius, radius))
    assert found["area"] == pytest.approx(math.pi * radius**2, rel=0.2 / radius)
    assert found["diameter"] == pytest.approx(2 * radius, abs=1.5)
    assert found["asymmetry"] < 0.6 / radius, "below a pixel along the border"
    assert found["irregularity"] == pytest.approx(1, abs=0.012)
    assert math.isnan(found["variegation"])


@pytest.mark.parametrize("turn", [0, 17, 45, 80])
def test_an_ellipse_at_any_angle(turn):
    a, b = 120, 50
    found = measure(ellipse(a, b, turn=turn))
    perimeter = 4 * a * ellipe(1 - (b / a) ** 2)  # the complete elliptic integral of the second kind
    assert found["area"] == pytest.approx(math.pi * a * b, rel=2e-3)
    assert found["diameter"] == pytest.approx(2 * a, abs=1.5)
    assert found["asymmetry"] < 0.015
    assert found["irregularity"] == pytest.approx(perimeter**2 / (4 * math.pi**2 * a * b), rel=0.015)


def test_a_square_is_exact():
    found = measure(square(100))
    assert found["area"] == 10_000
    assert found["diameter"] == pytest.approx(100 * math.sqrt(2), rel=1e-6)
    assert found["asymmetry"] == 0
    assert found["irregularity"] == pytest.approx(4 / math.pi, rel=0.03), "its corners are smoothed by two pixels"


@pytest.mark.parametrize("turn", [20, 33, 70])
def test_a_turned_square_is_symmetric_though_its_principal_axes_point_anywhere(turn):
    mask = polygon((-80, -80), (80, -80), (80, 80), (-80, 80), turn=turn)
    assert asymmetry(mask) < 0.03
    assert diameter(mask) == pytest.approx(160 * math.sqrt(2), abs=2)
    assert irregularity(mask) == pytest.approx(4 / math.pi, rel=0.03)


@pytest.mark.parametrize("turn", [0, 25, 140])
def test_a_triangle_folds_by_a_third_about_the_axis_across_it(turn):
    """Symmetric about its height; about the parallel to its base through the centroid, 1/3 does not meet: mean 1/6."""
    mask = polygon((-40, -70), (40, -70), (0, 140), size=360, turn=turn)
    assert asymmetry(mask) == pytest.approx(1 / 6, abs=0.01)


def test_a_disc_with_a_piece_off_is_less_symmetric_and_a_star_less_regular():
    disc, y = ellipse(100, 100), np.mgrid[:320, :320][0]
    cut = disc & (y < 200)
    assert asymmetry(cut) > 0.05 > asymmetry(disc)
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    star = polygon(*((100 + 12 * np.cos(9 * t)) * np.array([np.cos(t), np.sin(t)]) for t in angles))
    radius, slope = 100 + 12 * np.cos(9 * angles), -108 * np.sin(9 * angles)
    perimeter = np.hypot(radius, slope).mean() * 2 * np.pi
    area = (radius**2).mean() * np.pi
    assert irregularity(star) == pytest.approx(perimeter**2 / (4 * np.pi * area), rel=0.03)


def test_the_outline_does_not_grow_with_resolution():
    small, large = (irregularity(ellipse(r, r, size=900)) for r in (50, 400))
    assert small == pytest.approx(large, abs=0.01)


def test_millimetres():
    a, b = measure(square(100)), measure(square(100), pixel=0.05)
    assert b["area"] == pytest.approx(a["area"] * 0.0025)
    assert b["diameter"] == pytest.approx(a["diameter"] * 0.05)
    assert (b["asymmetry"], b["irregularity"]) == (a["asymmetry"], a["irregularity"])
    assert (unit("area", "mm"), unit("diameter"), unit("asymmetry")) == ("mm²", "px", "")


def test_variegation_of_two_halves_is_half_of_their_distance():
    mask = square(100)
    image = np.zeros((320, 320, 3), dtype=np.uint8)
    assert variegation(mask, image) == 0
    image[:, 90:] = 255  # black and white are 100 apart in CIELAB
    assert variegation(mask, image) == pytest.approx(50, abs=1e-3)
    colours = np.float32([[[200, 120, 90], [90, 60, 50]]])
    image[:, :90], image[:, 90:] = colours[0].astype(np.uint8)
    lab = cv2.cvtColor(colours / 255, cv2.COLOR_RGB2LAB)[0]
    assert measure(mask, image)["variegation"] == pytest.approx(np.linalg.norm(lab[0] - lab[1]) / 2, rel=1e-5)


def test_colour_in_a_hole_is_not_of_the_lesion():
    mask, image = square(100), np.full((320, 320, 3), 90, dtype=np.uint8)
    mask[60:70, 80:90], image[60:70, 80:90] = False, 255
    found = measure(mask, image)
    assert found["variegation"] == 0
    assert found["area"] == 9_900
    assert found["irregularity"] == measure(square(100))["irregularity"]


def test_a_speck_adds_its_area_and_nothing_else():
    mask = square(100)
    mask[300, 300] = True
    a, b = measure(mask), measure(square(100))
    assert a["area"] == b["area"] + 1
    assert a["diameter"] == b["diameter"]
    assert largest(mask).sum() == 10_000


@pytest.mark.parametrize("pixels", [0, 1, 3])
def test_nothing_and_nearly_nothing(pixels):
    mask = np.zeros((20, 20), dtype=bool)
    mask[5, 5 : 5 + pixels] = True
    found = measure(mask, np.zeros((20, 20, 3), dtype=np.uint8))
    assert tuple(found) == NAMES
    assert found["area"] == pixels
    assert found["diameter"] == pytest.approx(math.hypot(pixels, 1) if pixels else 0)
    assert math.isnan(found["irregularity"])
    assert math.isnan(found["variegation"]) == (pixels == 0)


def test_pixel_length_comes_from_the_table():
    assert pixel_length({}, "k") is None
    assert pixel_length({"mm_per_pixel": "0.04"}, "k") == 0.04
    for wrong in ("thick", "-1", 0, "nan"):
        with pytest.raises(UserError, match="sample k: mm_per_pixel"):
            pixel_length({"mm_per_pixel": wrong}, "k")
