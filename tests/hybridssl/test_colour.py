from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF

from hybridssl import colour
from hybridssl.views import ViewOptions

PLAIN = ViewOptions(jitter=0, grayscale=0, solarize=0, blur=(0, 0, 0))


def crops(n: int = 4, channels: int = 3, size: int = 24, low: int = 90, high: int = 160) -> torch.Tensor:
    """Mid tones, so that no reference has to clamp."""
    values = np.random.default_rng(0).integers(low, high, (n, channels, size, size), dtype=np.uint8)
    return torch.from_numpy(values)


def means(images: torch.Tensor) -> np.ndarray:
    return images.float().mean((2, 3)).numpy() / 255


def mapped(images: torch.Tensor, b: float, c: float, s: float, turn: float = 0.0, grey: bool = False) -> torch.Tensor:
    n, channels = images.shape[:2]
    linear, bias = colour.affine(
        means(images), np.full(n, b), np.full(n, c), np.full(n, s), np.full(n, turn), np.full(n, grey)
    )
    rest = np.tile([colour.NEVER, 0.0], (n, 1))
    numbers = torch.from_numpy(np.concatenate([linear.reshape(n, -1), bias, rest], 1).astype(np.float32))
    assert numbers.shape[1] == colour.size(channels)
    return colour.apply(images, numbers, 2.0)


@pytest.mark.parametrize(("b", "c", "s"), [(1.2, 1, 1), (1, 0.6, 1), (1, 1, 1.2), (1.15, 1.3, 0.8), (0.7, 1.4, 1.2)])
def test_the_affine_map_is_torchvision_in_the_same_order(b: float, c: float, s: float) -> None:
    images = crops()
    expected = TF.adjust_contrast(TF.adjust_brightness(images.float() / 255, b), c)
    expected = TF.adjust_saturation(expected, s)
    assert (mapped(images, b, c, s) - expected).abs().max() < 1e-3  # torchvision's luma weights sum to .9999


def test_grey_is_torchvisions() -> None:
    images = crops()
    out = mapped(images, 1, 1, 1, grey=True)
    assert torch.allclose(out[:, 0], out[:, 1])
    assert torch.allclose(out[:, 1], out[:, 2])
    assert (out - TF.rgb_to_grayscale(images.float() / 255, 3)).abs().max() < 1e-3


def test_hue_turns_the_circle_and_keeps_luma() -> None:
    images = crops()
    luma = torch.tensor(colour.GREY, dtype=torch.float32)[:, None, None]
    for turn in (0.1, -0.1, 0.4):
        out = mapped(images, 1, 1, 1, turn=turn)
        assert ((out - images / 255) * luma).sum(1).abs().max() < 1e-3
        assert (out - images / 255).abs().mean() > 0.01
    assert (mapped(images, 1, 1, 1, turn=1.0) - images / 255).abs().max() < 1e-5
    red = torch.tensor([160, 110, 110], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert mapped(red, 1, 1, 1, turn=1 / 3)[0, :, 0, 0].argmax() == 1  # the direction of torchvision: red to green
    assert TF.adjust_hue(red, 1 / 3)[0, :, 0, 0].argmax() == 1


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channel_counts_keep_brightness_and_contrast_only(channels: int) -> None:
    images = crops(channels=channels)
    x = images.float() / 255
    expected = 1.2 * (0.8 * x + 0.2 * x.mean((2, 3), keepdim=True))
    assert (mapped(images, 1.2, 0.8, 0.3, turn=0.2, grey=True) - expected).abs().max() < 1e-5


def test_values_are_clamped_once_to_the_unit_range() -> None:
    out = mapped(crops(low=0, high=255), 1.4, 1.4, 1.2)
    assert out.min() == 0
    assert out.max() == 1


def test_blur_is_torchvisions_with_a_sigma_per_image() -> None:
    images = torch.rand(5, 3, 40, 32)
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.7, 2.0])
    out = colour.blur(images, sigma, 2.0)
    for i, s in enumerate(sigma.tolist()):
        assert (out[i] - TF.gaussian_blur(images[i], [13, 13], [s, s])).abs().max() < 1e-5


def test_blur_fits_a_crop_smaller_than_its_kernel() -> None:
    flat = torch.full((2, 1, 4, 4), 0.25)
    assert torch.allclose(colour.blur(flat, torch.tensor([2.0, 1.0]), 2.0), flat)


def test_rows_that_ask_for_nothing_stay_as_they_are() -> None:
    images = crops(low=0, high=255)
    numbers = torch.zeros(4, 14)
    numbers[:, [0, 4, 8]] = 1
    numbers[:, 12] = torch.tensor([colour.NEVER, colour.SOLARIZE_AT, colour.NEVER, colour.SOLARIZE_AT])
    numbers[:, 13] = torch.tensor([0.0, 0.0, 1.5, 1.5])
    out = colour.apply(images, numbers, 2.0)
    x = images.float() / 255
    blurred = colour.blur(x[2:], torch.full((2,), 1.5), 2.0)
    expected = torch.stack([x[0], TF.solarize(x[1], 128 / 255), blurred[0], TF.solarize(blurred[1], 128 / 255)])
    assert (out - expected).abs().max() < 1e-5


def drawn(options: ViewOptions, n: int = 2000, views: int = 4) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.stack([colour.draw(rng, np.full((views, 3), 0.5), options) for _ in range(n)])  # [n, V, 14]


def test_draws_follow_the_probabilities() -> None:
    numbers = drawn(ViewOptions(jitter=0.8, grayscale=0, blur=(1.0, 0.1, 0.5), solarize=0.2))
    untouched = np.abs(numbers[..., :9] - np.eye(3).reshape(-1)).max(-1) < 1e-6
    assert abs(untouched.mean() - 0.2) < 0.02
    assert (numbers[:, [0, 2, 3], 12] == colour.NEVER).all()
    assert abs((numbers[:, 1, 12] < 1).mean() - 0.2) < 0.03
    blurred = (numbers[..., 13] > 0).mean(0)
    assert blurred[0] == 1
    assert np.abs(blurred[1:] - [0.1, 0.5, 0.5]).max() < 0.04
    sigma = numbers[..., 13][numbers[..., 13] > 0]
    assert sigma.min() >= 0.1
    assert sigma.max() <= 2.0


def test_everything_off_is_the_identity() -> None:
    numbers = drawn(PLAIN, n=20)
    assert numbers.dtype == np.float32
    assert np.allclose(numbers[..., :12], np.r_[np.eye(3).reshape(-1), 0, 0, 0], atol=1e-6)
    assert (numbers[..., 12] == colour.NEVER).all()
    assert (numbers[..., 13] == 0).all()


def test_a_probability_does_not_shift_the_other_draws() -> None:
    a, b = drawn(ViewOptions(blur=(1, 1, 1)), n=20), drawn(ViewOptions(blur=(1, 0, 0)), n=20)
    assert np.array_equal(a[..., :13], b[..., :13])
