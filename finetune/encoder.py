"""What every frozen backbone looks like to a protocol, and the baseline that has no weights at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hybridssl.errors import UserError
from hybridssl.views import normalise
from hybridssl.weights import weights_sha256

Pair = tuple[Tensor, "Tensor | None"]  # cls [N, D], patches [N, P, D] or None


@dataclass(frozen=True)
class Encoder:
    """A frozen backbone. `tokens` maps uint8 [N, C, H, W] to (cls [N, D], patches [N, P, D] or None) on `device`."""

    name: str
    sha256: str  # of the weights, so that features can be cached and results compared
    dim: int
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokens: Callable[[Tensor], Pair]
    channels: int = 3
    baseline: bool = False  # random weights or a histogram: the floor of every table
    digests: np.ndarray | None = None  # int64: images that its pretraining read; None: not recorded
    device: str = "cpu"
    model: nn.Module | None = None  # what `tokens` runs; None for the histogram, which has no weights
    reading: str = ""  # how the same weights are read since it changed: kept features of before are not taken for these

    def about(self) -> dict[str, Any]:
        """What results.json says of a backbone."""
        return {name: getattr(self, name) for name in ("name", "sha256", "baseline", "dim", "input_size")}

    @torch.inference_mode()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [N, C, H, W] -> {"cls": float32 [N, D]}, with "patch_mean" [N, D] beside it where there are patches."""
        cls, patches = self.tokens(images.to(self.device))
        out = {"cls": cls} if patches is None else {"cls": cls, "patch_mean": patches.mean(1)}
        return {kind: x.float().cpu() for kind, x in out.items()}

    @torch.inference_mode()
    def patches(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> patch tokens float32 [N, P, D], row by row. UserError if there are none."""
        patches = self.tokens(images.to(self.device))[1]
        if patches is None:
            raise UserError(f"{self.name} has no patch features")
        return patches.float().cpu()


def from_model(model: nn.Module, forward: Callable[[Tensor], Pair], **about: Any) -> Encoder:
    mean, std = tuple(about["mean"]), tuple(about["std"])
    model.to(about["device"]).eval().requires_grad_(False)
    return Encoder(
        sha256=weights_sha256(model.state_dict()),
        tokens=lambda images: forward(normalise(images, mean, std)),
        model=model,
        **{**about, "mean": mean, "std": std},
    )


def histogram(device: str) -> Encoder:
    """Square root of the joint RGB histogram (8 bins a channel, 512 values) and a 16 x 16 thumbnail (768 values)."""

    def tokens(images: Tensor) -> Pair:
        count = images.shape[0]
        bins = (images.long() >> 5).flatten(2)  # [N, 3, HW]
        joint = (bins[:, 0] * 8 + bins[:, 1]) * 8 + bins[:, 2]
        histogram = torch.zeros(count, 512, device=images.device)
        histogram.scatter_add_(1, joint, torch.ones_like(joint, dtype=torch.float32))
        histogram = (histogram / joint.shape[1]).sqrt()  # Hellinger: rare colours count, common ones do not drown them
        thumbnail = nn.functional.adaptive_avg_pool2d(images.float() / 255, 16).flatten(1)
        return torch.cat([histogram, thumbnail], 1), None

    name = "histogram"
    digest = hashlib.sha256(b"sqrt joint RGB histogram 8x8x8 + 16x16 thumbnail, v1").hexdigest()
    return Encoder(name, digest, 1280, 64, (0, 0, 0), (1, 1, 1), tokens, baseline=True, device=device)
