"""DINO (Caron et al. 2021, arXiv 2104.14294) on CLS tokens, weighted and balanced as DINOv2 (arXiv 2304.07193) does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridssl import health
from hybridssl.fused import Targets, cross_entropy
from hybridssl.objectives._distil import Distil, DistilOptions, crossing
from hybridssl.schedule import cosine
from hybridssl.types import Batch, ViewTokens


@dataclass(frozen=True)
class Options(DistilOptions):
    local_weight: tuple[float, float] = (1.0, 1.0)  # factor of the local terms, cosine from first to second


class Dino(Distil):
    """Every crop of an image predicts what the teacher says of its *other* global view(s).

    With L local crops there are 2L local terms (each local crop against both teacher views) and 2 global ones (each
    global view against the other), and loss = [w * sum of the local + sum of the global] / (2L + 2):

    DINO (equation 3)   w = 1: the mean over all pairs of different views
    DINOv2              w = 1: [2L x mean local term + 2 x mean global term] / (2L + 2), which is the same number
    DINOv3 (2508.10104) w = 1, in its refinement with Gram anchoring from 1 to 0.5, then 0.5; the divisor stays

    Sinkhorn, as in the released DINOv2, sees the tokens of both global views in one call.
    """

    options: Options

    views = frozenset({"global", "local"})
    expects = (
        "Starts near ln K (the number of prototypes), falls, and may rise slowly while the teacher's temperature "
        "warms up, because softer targets have more entropy; flat at ln K for long means that nothing is learnt."
    )

    def targets(self, teacher: Sequence[ViewTokens], batches: Sequence[Batch], progress: float) -> list[Targets]:
        """Distributions [2, B] over the prototypes for the global views of each micro-batch."""
        return self.assign([tokens.global_.cls for tokens in teacher], 2, progress)

    def forward(self, student: ViewTokens, target: Targets, batch: Batch, progress: float) -> dict[str, Tensor]:
        crops = [student.global_.cls] + ([student.local.cls] if student.local is not None else [])
        z = self.head.bottleneck(torch.cat(crops)).unflatten(0, (-1, target.z.shape[1]))  # [2 + L, B, bottleneck]
        mix, weights = crossing(len(z), self.local_weight(progress), z)
        share = (weights / z.shape[1]).expand(z.shape[:2])  # the mean over images
        return {"dino": cross_entropy(z, self.head.weight, target, self.options.student_temperature, share, mix)}

    def local_weight(self, progress: float) -> float:
        """Factor of the local terms at this share of the run."""
        return cosine(*self.options.local_weight, progress)

    def schedules(self, progress: float) -> dict[str, float]:
        return {**super().schedules(progress), "local_weight": self.local_weight(progress)}

    @torch.no_grad()
    def health(self, student: ViewTokens, target: Targets, batch: Batch) -> dict[str, Tensor]:
        return health.of_targets(target.dense(), self.head(student.global_.cls).unflatten(0, (2, -1)))
