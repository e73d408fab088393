"""Gram anchoring (DINOv3, 2025, arXiv 2508.10104, section 4): patches stay as alike as they once were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridssl.heads import fp32
from hybridssl.objectives import Context, ObjectiveOptions
from hybridssl.objectives._reference import Reference, global_views
from hybridssl.schedule import first_step
from hybridssl.types import Batch, ViewTokens


@dataclass(frozen=True)
class Options(ObjectiveOptions):
    weight: float = 2.0
    refresh: float = 0.0  # share of the run after which a newer teacher takes its place, again and again; 0: never
    double: bool = False  # the reference sees the crops at twice the size, and its patch map is brought down again

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.refresh < 1:
            raise ValueError(f"refresh={self.refresh} must be a share of the run, from 0 to below 1")


class Gram(Reference):
    """Mean squared difference of the student's and an earlier teacher's cosines between all pairs of patches of a view.

    Long training lets patch features decay while CLS still improves. Only similarities are held: features may turn
    together, unlike in `anchor`. The first reference is the teacher at `start`; with start=0 that is the backbone that
    the run began with.

    A doubled crop is enlarged from the crop that the student sees: finer patches and smoother maps, at four times the
    cost of that pass, but no detail beyond the crop's own pixels (DINOv3 cuts it from the image again).
    """

    options: Options
    whole = True
    expects = "Small and slowly rising until the next refresh brings it down."

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        self.steps, self.first = context.steps, first_step(options.start, context.steps)
        self.every = max(1, round(options.refresh * context.steps)) if options.refresh else context.steps

    def targets(self, teacher: Sequence[ViewTokens], batches: Sequence[Batch], progress: float) -> list[Tensor]:
        """Unit patches [2B, P, D] of the reference for each micro-batch."""
        now = round(progress * self.steps)
        if (now - self.first) % self.every == 0:  # the teacher of this step, so a resumed run takes the same one
            self.refresh()
        return [self._patches(global_views(tokens)) for tokens in teacher]

    def _patches(self, images: Tensor) -> Tensor:
        if not self.options.double:
            return F.normalize(fp32(self.look(images).patches), dim=-1)
        large = F.interpolate(images, scale_factor=2, mode="bicubic")
        patches = fp32(self.look(large).patches).mT  # [2B, D, 4P]
        side = isqrt(patches.shape[2])
        small = F.interpolate(patches.unflatten(2, (side, side)), scale_factor=0.5, mode="bicubic")
        return F.normalize(small.flatten(2).mT, dim=-1)

    def forward(self, student: ViewTokens, target: Tensor, batch: Batch, progress: float) -> dict[str, Tensor]:
        ours = F.normalize(fp32(student.global_.patches), dim=-1)
        return {"gram": F.mse_loss(_gram(ours), _gram(target))}


def _gram(unit: Tensor) -> Tensor:
    """Cosines [N, P, P] of unit patches [N, P, D]."""
    with torch.autocast(unit.device.type, enabled=False):
        return unit @ unit.mT
