"""Corruptions: monotone in severity, deterministic, nested, and the same photograph at every size."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import cv2
import numpy as np
import pytest

from finetune.corruptions import CANVAS, NAMES, SEVERITIES, change, corrupt, names


@lru_cache(maxsize=64)
def photograph(size: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [C, S, S]: smooth blobs with detail, in mid tones, the same picture at every size."""
    rng = np.random.default_rng(seed)
    coarse, fine = rng.normal(0, 1, (6, 6, channels)), rng.normal(0, 1, (56, 56, channels))
    picture = sum(cv2.resize(a, (896, 896), interpolation=cv2.INTER_CUBIC) * g for a, g in ((coarse, 30), (fine, 12)))
    picture = cv2.resize(picture + 120, (size, size), interpolation=cv2.INTER_AREA).reshape(size, size, channels)
    return np.clip(picture, 0, 255).astype(np.uint8).transpose(2, 0, 1)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b).mean())


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("name", NAMES)
def test_every_severity_is_farther_from_the_clean_image(name, size):
    """On every image; JPEG, whose error is no simple function of its quality, on the mean of them."""
    far = np.array(
        [
            [distance(image, corrupt(image, name, s, seed)) for s in SEVERITIES]
            for seed in range(6)
            for image in [photograph(size, seed=seed)]
        ]
    )
    steps = np.diff(far.mean(0) if name == "jpeg" else far)
    assert (steps > 0).all(), far
    assert far[:, -1].min() > 1, "severity 5 is seen"


@pytest.mark.parametrize("name", NAMES)
def test_a_pure_function_of_name_severity_and_number(name):
    image = photograph(64)
    before = image.copy()
    a, b = (change(name, 4).function(image, 11) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, corrupt(image, name, 4, 11))
    np.testing.assert_array_equal(image, before)
    assert (a.shape, a.dtype) == (image.shape, np.uint8)
    others = [corrupt(image, name, 4, number) for number in range(12)]
    differ = any((other != a).any() for other in others)
    assert differ == (name not in ("blur", "jpeg")), "blur and JPEG have nothing to draw"


def test_names_tell_all_that_features_depend_on():
    every = {change(name, s).name for name in NAMES for s in SEVERITIES}
    assert len(every) == len(NAMES) * len(SEVERITIES)


@pytest.mark.parametrize("name", ["hair", "ruler"])
def test_what_is_drawn_stays_when_more_comes(name):
    image = np.full((3, 96, 96), 200, np.uint8)
    levels = [corrupt(image, name, s, 5).astype(int) for s in SEVERITIES]
    for less, more in pairwise(levels):
        assert (more <= less).all()
        assert (more < less).any()


@pytest.mark.parametrize("name", NAMES)
def test_another_size_is_the_same_photograph(name):
    """Corrupting at 448 pixels and halving is about corrupting at 224 pixels."""
    large, small = photograph(448), photograph(224)
    change_large = cv2.resize(_planes(corrupt(large, name, 5, 3)), (224, 224), interpolation=cv2.INTER_AREA)
    change_small = _planes(corrupt(small, name, 5, 3))
    moved = distance(change_small, _planes(small))
    assert distance(change_large, change_small) < (0.45 if name == "noise" else 0.15) * moved
    assert CANVAS >= 448


def _planes(image: np.ndarray) -> np.ndarray:
    return image.transpose(1, 2, 0).astype(np.float32)


def test_strengths_are_those_that_are_said():
    grey = np.full((3, 224, 224), 128, np.uint8)
    noise = corrupt(grey, "noise", 1, 0).astype(float) - 128
    assert noise.std() == pytest.approx(0.08 * 255, rel=0.02)
    dark_or_light = {round(corrupt(grey, "exposure", 3, n)[0, 0, 0] / 128, 2) for n in range(20)}
    assert dark_or_light == {round(round(128 * 2 ** (s / 2.2)) / 128, 2) for s in (-1, 1)}, "one stop, by the coin"
    cast = np.log(corrupt(grey, "colour", 2, 0).mean((1, 2)) / 128)
    assert np.linalg.norm(cast) == pytest.approx(0.12, abs=0.01)
    assert cast.sum() == pytest.approx(0, abs=0.02)
    edge = np.zeros((3, 224, 224), np.uint8)
    edge[:, :, 112:] = 255
    ramp = corrupt(edge, "blur", 2, 0)[0, 100].astype(
        float
    )  # the step response of a Gaussian: its slope is its density
    assert 255 / np.diff(ramp).max() == pytest.approx(2 * np.sqrt(2 * np.pi), rel=0.05)


@pytest.mark.parametrize("channels", [1, 5])
def test_other_numbers_of_channels(channels):
    image = photograph(64, channels)
    assert ("colour" in names(channels)) == (channels > 1)
    for name in names(channels):
        found = corrupt(image, name, 3, 1)
        assert found.shape == image.shape
        assert distance(image, found) > 0.1
