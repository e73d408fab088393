"""Colour, blur and solarisation: drawn in the worker as a few numbers a view, applied in batches on the device.

The numbers of one view with C channels, Q = C * C + C + 2 of them, float32:

    [0, C*C)        matrix, row-major: out = matrix @ in + bias, values in 0..1
    [C*C, C*C + C)  bias
    [C*C + C]       solarisation threshold in 0..1: values from there on are inverted; 2 = never
    [C*C + C + 1]   sigma of the Gaussian blur in pixels; 0 = none

Brightness, contrast, saturation, hue and grey are all affine, so one matrix holds them. That fixes their order
(torchvision shuffles it) and leaves one clamp at the end (torchvision clamps after each).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridssl.types import sent
from hybridssl.view_options import ViewOptions

NEVER = 2.0  # a solarisation threshold that no value reaches
SOLARIZE_AT = 128 / 255

GREY = np.array([0.299, 0.587, 0.114])  # luma, ITU-R BT.601
_YIQ = np.array([GREY, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_RGB = np.linalg.inv(_YIQ)


def size(channels: int) -> int:
    """Q, the length of a view's colour parameters."""
    return channels * channels + channels + 2


def draw(rng: np.random.Generator, means: np.ndarray, options: ViewOptions) -> np.ndarray:
    """Parameters [V, Q] for V views, the two global ones first, whose crops have the channel `means` [V, C] in 0..1.

    All numbers are drawn whether used or not, so that changing one probability leaves the other draws alone.
    """
    views = len(means)
    u = rng.random((views, 9))

    def factor(column: int, strength: float) -> np.ndarray:  # [V], 1 where there is no jitter
        return np.where(u[:, 0] < options.jitter, 1 + strength * (2 * u[:, column] - 1), 1.0)

    brightness, contrast = factor(1, options.brightness), factor(2, options.contrast)
    saturation, turn = factor(3, options.saturation), factor(4, options.hue) - 1
    linear, bias = affine(means, brightness, contrast, saturation, turn, u[:, 5] < options.grayscale)

    threshold = np.full(views, NEVER)
    threshold[1] = SOLARIZE_AT if u[1, 6] < options.solarize else NEVER  # the second global view only, as in BYOL
    chance = np.full(views, options.blur[2])
    chance[:2] = options.blur[:2]
    low, high = options.blur_sigma
    sigma = np.where(u[:, 7] < chance, low + (high - low) * u[:, 8], 0.0)
    return np.concatenate(
        [linear.reshape(views, -1), bias, threshold[:, None], sigma[:, None]], axis=1, dtype=np.float32
    )


def affine(
    means: np.ndarray,
    brightness: np.ndarray,
    contrast: np.ndarray,
    saturation: np.ndarray,
    turn: np.ndarray,
    grey: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Matrices [V, C, C] and biases [V, C] of: brightness, contrast, saturation, hue (`turn` of a circle), grey.

    Contrast turns about the mean grey of the brightened crop. The maps after it keep grey values, so its bias passes
    through them. With C other than 3 there is no colour: brightness and contrast only, each channel about its own mean.
    """
    views, channels = means.shape
    gain = brightness * contrast  # [V]
    if channels != 3:
        return gain[:, None, None] * np.eye(channels), ((1 - contrast) * brightness)[:, None] * means
    to_grey = np.tile(GREY, (3, 1))
    s = saturation[:, None, None]
    linear = gain[:, None, None] * (s * np.eye(3) + (1 - s) * to_grey)
    rotation = np.zeros((views, 3, 3))
    rotation[:, 0, 0] = 1
    cosine, sine = np.cos(2 * math.pi * turn), np.sin(2 * math.pi * turn)
    rotation[:, 1, 1], rotation[:, 1, 2], rotation[:, 2, 1], rotation[:, 2, 2] = cosine, sine, -sine, cosine
    linear = _RGB @ rotation @ _YIQ @ linear
    linear = np.where(grey[:, None, None], to_grey @ linear, linear)
    bias = (1 - contrast) * brightness * (means @ GREY)
    return linear, np.repeat(bias[:, None], 3, axis=1)


def apply(crops: Tensor, parameters: Tensor, sigma_max: float) -> Tensor:
    """uint8 [N, C, H, W] and [N, Q] -> float32 [N, C, H, W] in 0..1: colour, clamp, blur, solarisation.

    The parameters lie on the host, which reads from them what to blur and invert: an accelerator does no other rows,
    and is never asked.
    """
    n, c, height, width = crops.shape
    blurred, inverted = (parameters[:, -1] > 0).nonzero()[:, 0], (parameters[:, -2] < NEVER).nonzero()[:, 0]
    blurred, inverted, numbers = (sent(t, crops.device) for t in (blurred, inverted, parameters))
    matrix, bias, threshold, sigma = numbers.split([c * c, c, 1, 1], dim=1)
    flat = torch.bmm(matrix.view(n, c, c) / 255, crops.flatten(2).float()).add_(bias[:, :, None])
    images = flat.clamp_(0, 1).view(n, c, height, width)
    if len(blurred):
        images.index_copy_(0, blurred, blur(images[blurred], sigma[blurred, 0], sigma_max))
    if len(inverted):
        some = images[inverted]
        at = threshold[inverted, :, None, None]
        images.index_copy_(0, inverted, torch.where(some >= at, 1 - some, some))
    return images


def blur(images: Tensor, sigma: Tensor, sigma_max: float) -> Tensor:
    """Gaussian blur of [N, C, H, W] with a sigma [N] each, in pixels; separable, borders reflected.

    `sigma_max` bounds the kernel's radius (3 sigma), so that its size does not depend on what was drawn.
    """
    n, c, height, width = images.shape
    radius = min(math.ceil(3 * sigma_max), height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]  # [N * C, 1, 2 radius + 1]
    padded = F.pad(images, (radius,) * 4, mode="reflect").flatten(0, 1)[None]  # a group per image and channel
    rows = F.conv2d(padded, kernel[:, :, None, :], groups=n * c)
    return F.conv2d(rows, kernel[:, :, :, None], groups=n * c).view(n, c, height, width)
