"""KoLeo (Sablayrolles et al. 2019, arXiv 1806.03198, eq. 2): neighbours part, so that features fill the sphere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridssl.errors import UserError
from hybridssl.heads import fp32
from hybridssl.objectives import Context, Objective, ObjectiveOptions
from hybridssl.types import Batch, ViewTokens


@dataclass(frozen=True)
class Options(ObjectiveOptions):
    weight: float = 0.1
    group: int = 16  # neighbours are sought among this many consecutive images


class Spread(Objective):
    """-1/n sum_i log min_{j != i} ||x_i - x_j|| over unit student CLS tokens, summed over both global views (DINOv2).

    Neighbours are sought inside groups of consecutive images and not in the whole micro-batch: then every
    micro-batch size and number of processes that the group divides gives the same loss.
    """

    options: Options
    expects = (
        "Falls as features spread over the sphere, and is often negative; a sharp rise means that images are "
        "becoming alike (collapse)."
    )

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        self.group = min(options.group, context.batch or options.group)
        if context.micro % self.group:
            raise UserError(_does_not_divide(self.group, context.micro))

    def forward(self, student: ViewTokens, target: Any, batch: Batch, progress: float) -> dict[str, Tensor]:
        views = fp32(student.global_.cls).unflatten(0, (2, -1))  # [2, B, D]
        images, group = views.shape[1], min(self.group, views.shape[1])
        if images % group:
            raise UserError(_does_not_divide(group, images))
        return {"spread": koleo(views.reshape(-1, group, views.shape[-1])) * 2}


def _does_not_divide(group: int, micro: int) -> str:
    return (
        f"objectives.spread.group={group} does not divide batch.micro={micro}: neighbours are sought in whole groups, "
        f"so make batch.micro a multiple of {group}, or the group smaller"
    )


def koleo(x: Tensor) -> Tensor:
    """Mean over groups and images of -log(distance to the nearest of the group), x [groups, n, D] -> scalar.

    An image alone in its group has no neighbour: zero, on the graph. Two identical rows have no direction in
    which to part and would ask for an infinite gradient; below 1e-4 the distance is held constant.
    """
    if x.shape[1] < 2:
        return x.sum() * 0
    x = F.normalize(x, dim=-1, eps=1e-8)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        cosine = x @ x.mT
        cosine.diagonal(dim1=1, dim2=2).fill_(-2)
        nearest = cosine.argmax(dim=2, keepdim=True)  # [groups, n, 1]
    neighbour = x.gather(1, nearest.expand_as(x))
    return -(x - neighbour).norm(dim=-1).clamp_min(1e-4).log().mean()
