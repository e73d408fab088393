"""DINO (Caron et al. 2021, arXiv 2104.14294) on CLS tokens, weighted and balanced as DINOv2 (arXiv 2304.07193) does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridssl import health
from hybridssl.heads import cross_entropy
from hybridssl.objectives._distil import Distil, DistilOptions
from hybridssl.types import Batch, ViewTokens


@dataclass(frozen=True)
class Options(DistilOptions):
    pass


class Dino(Distil):
    """Every crop of an image predicts what the teacher says of its *other* global view(s).

    With L local crops: each local against both teacher views (2L terms), each global against the other one (2), and
    the mean over these 2L + 2. It is DINOv2's [16 local terms + 2 x mean cross-view term] / 18 for L = 8, and DINO's
    equation 3 for any L. Sinkhorn, as in the released DINOv2, sees the tokens of both global views in one call.
    """

    views = frozenset({"global", "local"})
    expects = (
        "Starts near ln K (the number of prototypes), falls, and may rise slowly while the teacher's temperature "
        "warms up, because softer targets have more entropy; flat at ln K for long means that nothing is learnt."
    )

    def targets(self, teacher: Sequence[ViewTokens], batches: Sequence[Batch], progress: float) -> list[Tensor]:
        """Distributions [2, B, K] over the prototypes for the global views of each micro-batch."""
        cls = [tokens.global_.cls for tokens in teacher]
        assigned = self.assign(torch.cat(cls), progress).split([len(rows) for rows in cls])
        return [rows.unflatten(0, (2, -1)) for rows in assigned]

    def forward(self, student: ViewTokens, target: Tensor, batch: Batch, progress: float) -> dict[str, Tensor]:
        crops = [student.global_.cls] + ([student.local.cls] if student.local is not None else [])
        z = self.head.bottleneck(torch.cat(crops)).unflatten(0, (-1, target.shape[1]))  # [2 + L, B, bottleneck]
        weight, temperature = self.head.weight, self.options.student_temperature
        wanted = [target[1], target[0]] + [target.sum(dim=0)] * (len(z) - 2)  # linear in the target: both at once
        terms = [cross_entropy(view, weight, t, temperature).mean() for view, t in zip(z, wanted, strict=True)]
        return {"dino": torch.stack(terms).sum() / (2 * len(z) - 2)}

    @torch.no_grad()
    def health(self, student: ViewTokens, target: Tensor, batch: Batch) -> dict[str, Tensor]:
        scores = self.head(student.global_.cls)
        flat = target.flatten(0, 1)
        return {
            "target_entropy": health.target_entropy(flat),
            "marginal_entropy": health.marginal_entropy(flat),
            "max_entropy": health.max_entropy(flat),
            "agreement": health.agreement(scores, target.flip(0).flatten(0, 1)),
            "prototype_usage": health.prototype_usage(target[0]),
        }
