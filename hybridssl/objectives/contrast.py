"""MoCo v3 (Chen et al. 2021, arXiv 2104.02057, algorithm 1): find one's own other view among the keys of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridssl.dist import all_gather, rank
from hybridssl.heads import fp32, linear32
from hybridssl.objectives import Context, Objective, ObjectiveOptions
from hybridssl.types import Batch, ViewTokens


@dataclass(frozen=True)
class Options(ObjectiveOptions):
    hidden: int = 4096  # width of both MLPs
    bottleneck: int = 256  # width of the unit vectors that are compared
    temperature: float = 0.2  # by which cosines are divided


class Target(NamedTuple):
    keys: Tensor  # [2, N, bottleneck]: of all N images of the effective batch, of all processes, by view
    first: int  # row of the first image of this micro-batch


class Contrast(Objective):
    """2 T [CE(q_1 . k_2 / T) + CE(q_2 . k_1 / T)], with q of the student's and k of the teacher's CLS tokens.

    The teacher is the momentum encoder; it has no use for the predictor. Negatives are the other images of the whole
    effective batch, however it is parted. MoCo v3 has batch normalisation in its heads, which would see a micro-batch
    and not the batch; layer normalisation stands in its place (section 4.3 finds that the method works without it).
    """

    options: Options
    taught = True
    expects = (
        "Starts near 4 T ln N (T .2, N images a batch: 4.4 for 256) and falls; it stays high where images of the batch "
        "are near duplicates, which nothing can tell apart."
    )

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        self.projector = _mlp(context.dim, options.hidden, options.hidden, options.bottleneck)
        self.predictor = _mlp(options.bottleneck, options.hidden, options.bottleneck)

    @torch.no_grad()
    def targets(self, teacher: Sequence[ViewTokens], batches: Sequence[Batch], progress: float) -> list[Target]:
        keys = [_unit(self.projector(tokens.global_.cls)).unflatten(0, (2, -1)) for tokens in teacher]
        mine = torch.cat(keys, dim=1).transpose(0, 1)  # images first, so that processes join at the right end
        joined = all_gather(mine).transpose(0, 1)
        targets, first = [], rank() * len(mine)
        for part in keys:
            targets.append(Target(joined, first))
            first += part.shape[1]
        return targets

    def forward(self, student: ViewTokens, target: Target, batch: Batch, progress: float) -> dict[str, Tensor]:
        queries = _unit(self.predictor(self.projector(student.global_.cls))).unflatten(0, (2, -1))  # [2, B, bottleneck]
        own = torch.arange(queries.shape[1], device=queries.device) + target.first
        temperature, keys = self.options.temperature, target.keys.flip(0)
        terms = [F.cross_entropy(linear32(q, k) / temperature, own) for q, k in zip(queries, keys, strict=True)]
        return {"contrast": 2 * temperature * torch.stack(terms).sum()}


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(fp32(rows), dim=1)


def _mlp(*widths: int) -> nn.Sequential:
    """Linear layers with layer normalisation and GELU between them."""
    steps = [step for a, b in pairwise(widths) for step in (nn.Linear(a, b), nn.LayerNorm(b), nn.GELU())]
    return nn.Sequential(*steps[:-2])
