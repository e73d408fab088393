"""iBOT (Zhou et al. 2022, arXiv 2111.07832): name the patches that were hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hybridssl.dist import all_reduce_sum, world_size
from hybridssl.errors import UserError
from hybridssl.fused import Targets, cross_entropy
from hybridssl.objectives import Objective
from hybridssl.objectives._distil import Distil, DistilOptions
from hybridssl.types import Batch, Tokens, ViewTokens


@dataclass(frozen=True)
class Options(DistilOptions):
    head: Literal["own", "dino"] = "own"  # own: DINOv2; dino: patches and CLS share dino's (iBOT, section 3.2)


class Target(NamedTuple):
    patches: Targets  # [1, M]: what the teacher says of each masked patch, in the order of the mask
    scale: Tensor  # scalar: micro-batches x processes / masked views of all of them


class Ibot(Distil):
    """A masked patch of a global view predicts what the teacher, who saw it, says of that same patch.

    loss = mean over masked views v of [ 1 / n_v sum over the n_v masked patches of v of CE(teacher, student) ].

    Only masked patches pass through the heads, and the assignment is balanced over all of them in the effective
    batch. The mean is over views that *have* a mask, so that its size does not depend on how many do; DINOv2
    divides by all views, masked or not: with masks on half of them its weight of 1 is a weight of 0.5 here.
    """

    options: Options
    masked = True
    expects = (
        "Starts near ln K (the number of prototypes) and falls more slowly than DINO; it may rise slowly while "
        "the teacher's temperature warms up."
    )

    def meet(self, others: Mapping[str, Objective]) -> None:
        if self.options.head == "own":
            return
        dino = others.get("dino")
        if not isinstance(dino, Distil):
            raise UserError(
                "objectives.ibot.head=dino, but this recipe has no dino to share a head with: give objectives.dino a "
                "weight, or set objectives.ibot.head=own"
            )
        mine, theirs = self.options, dino.options
        for key in ("prototypes", "hidden", "bottleneck"):
            if getattr(mine, key) != getattr(theirs, key):
                raise UserError(
                    f"objectives.ibot.head=dino, but objectives.ibot.{key}={getattr(mine, key)} and "
                    f"objectives.dino.{key}={getattr(theirs, key)}: one head has one, so give both the same"
                )
        if theirs.start > mine.start:
            raise UserError(
                f"objectives.ibot.head=dino, but the shared head rests until objectives.dino.start={theirs.start}: let "
                f"dino start no later than ibot ({mine.start}), or set objectives.ibot.head=own"
            )
        self.since = theirs.start
        del self.head
        object.__setattr__(self, "head", dino.head)  # not registered here: trained, averaged and saved once, as dino's

    def targets(self, teacher: Sequence[ViewTokens], batches: Sequence[Batch], progress: float) -> list[Target]:
        hidden = [_masked(tokens.global_, batch) for tokens, batch in zip(teacher, batches, strict=True)]
        assigned = self.assign(hidden, 1, progress)
        views = all_reduce_sum(torch.stack([batch.masks.any(dim=-1).sum() for batch in batches]).sum())
        scale = len(batches) * world_size() / views.clamp_min(1)
        return [Target(rows, scale) for rows in assigned]

    def forward(self, student: ViewTokens, target: Target, batch: Batch, progress: float) -> dict[str, Tensor]:
        z = self.head.bottleneck(_masked(student.global_, batch))  # [M, bottleneck]
        masks = batch.masks.flatten(0, 1)  # [2B, P]
        share = (1 / masks.sum(dim=1).clamp_min(1))[batch.hidden // masks.shape[1]]  # 1 / n_v for each patch
        temperature = self.options.student_temperature
        return {
            "ibot": cross_entropy(z[None], self.head.weight, target.patches, temperature, share[None] * target.scale)
        }


def _masked(tokens: Tokens, batch: Batch) -> Tensor:
    """The masked patches [M, D] of the global views, view-major, then in the order of the grid."""
    return tokens.patches.flatten(0, 1).index_select(0, batch.hidden)
