"""Anchor: features may not stray far from those of the backbone that the run started with (DELTA, arXiv 1901.09229)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hybridssl.heads import fp32
from hybridssl.objectives import ObjectiveOptions
from hybridssl.objectives._reference import Reference, global_views
from hybridssl.types import Batch, Tokens, ViewTokens


@dataclass(frozen=True)
class Options(ObjectiveOptions):
    pass


class Anchor(Reference):
    """1 - cos(student, start), for the CLS and for the patch tokens of the global views: two terms, each a mean.

    The start sees the views whole. A patch that is hidden from the student counts too: it has to be named as the start
    saw it.
    """

    whole = True
    expects = (
        "Starts near 0 where no patch is hidden, for the start is the student itself, and rises while the student "
        "learns; the higher it settles, the further features have moved. Raise its weight to keep more."
    )

    def targets(self, teacher: Sequence[ViewTokens], batches: Sequence[Batch], progress: float) -> list[Tokens]:
        return [self.look(global_views(tokens)) for tokens in teacher]

    def forward(self, student: ViewTokens, target: Tokens, batch: Batch, progress: float) -> dict[str, Tensor]:
        tokens = student.global_
        return {"cls": _distance(tokens.cls, target.cls), "patches": _distance(tokens.patches, target.patches)}


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean cosine distance of rows [..., D]: 0 alike, 2 opposite."""
    return 1 - F.cosine_similarity(fp32(ours), fp32(theirs), dim=-1).mean()
