"""Partial labels of several sources: what a source cannot name is unknown, what it could have named is a negative."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridssl.dist import all_reduce_sum, world_size
from hybridssl.errors import UserError
from hybridssl.heads import fp32, linear32
from hybridssl.objectives import Context, Objective, ObjectiveOptions
from hybridssl.types import Batch, ViewTokens


@dataclass(frozen=True)
class Options(ObjectiveOptions):
    kind: Literal["one_of", "multi"] = "one_of"  # softmax (one diagnosis an image) or sigmoids (several findings)
    view: Literal["clean", "global"] = "clean"  # the mild view, or both augmented global ones
    head: Literal["cosine", "linear"] = "cosine"
    init: Literal["random", "text"] = "random"  # text: prototypes from `python -m hybridssl prototypes`
    scale: float = 10.0  # of the cosines: 1 / temperature
    smoothing: float = 0.0  # label smoothing, over the classes that the image's source can name
    dropout: float = 0.0  # on the features, before the head
    unfreeze_at: float = 0.1  # share of the run after which text prototypes move; 1: never


class Labels(Objective):
    """Cross-entropy of the student's CLS token with class prototypes, over the classes that its source can name.

    one_of: softmax restricted to these classes. multi: DermINO (arXiv 2508.12190), the mean over labelled views of
    sum_c m_c BCE(logit_c, y_c) / sum_c m_c, with m = 1 for these classes. An image without a label is skipped, and
    for one_of also one that is labelled as none of its source's classes. An image without a source may name every
    class. The mean is over all labelled views of all micro-batches and processes.
    """

    options: Options
    nameable: Tensor
    expects = (
        "Starts near ln(number of classes) (one_of) or .69 (multi) and falls; near zero long before the end "
        "means that the labels are learnt by heart."
    )

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        self.views = frozenset({options.view})
        if context.classes == 0:
            raise UserError("objectives.labels: the data names no class; label some images or set its weight to 0")
        everything = torch.ones(1, context.classes, dtype=torch.bool)  # the last row, so that source -1 finds it
        self.register_buffer("nameable", torch.cat([context.named.bool().cpu(), everything]), persistent=False)
        self.weight = nn.Parameter(_prototypes(options, context))
        with_bias = options.head == "linear" or options.kind == "multi"  # cosines alone cannot say "rare"
        self.bias = nn.Parameter(torch.zeros(context.classes)) if with_bias else None
        self.dropout = nn.Dropout(options.dropout)

    def targets(self, teacher: Sequence[ViewTokens], batches: Sequence[Batch], progress: float) -> list[Tensor]:
        """For each micro-batch the factor that turns the sum over its labelled images into its share of the mean."""
        counted = all_reduce_sum(torch.stack([self._known(batch)[2].sum() for batch in batches]).sum())
        return [len(batches) * world_size() / counted.clamp_min(1)] * len(batches)

    def forward(self, student: ViewTokens, target: Tensor, batch: Batch, progress: float) -> dict[str, Tensor]:
        tokens = student.clean if self.options.view == "clean" else student.global_
        if tokens is None:
            raise UserError(f"objectives.labels.view={self.options.view}, but the loader yields no such view")
        positive, nameable, counted = self._known(batch)
        views = 1 if self.options.view == "clean" else 2
        logits = self.logits(self.dropout(tokens.cls)).unflatten(0, (views, len(counted)))
        loss = one_of if self.options.kind == "one_of" else multi
        losses = loss(logits, positive, nameable, self.options.smoothing)  # [views, B]
        return {"labels": (losses.mean(dim=0) * counted).sum() * target}

    def logits(self, features: Tensor) -> Tensor:
        """[N, dim] -> [N, K], also for classes and images beyond the training labels."""
        if self.options.head == "linear":
            return linear32(features, self.weight, self.bias)
        cosine = linear32(F.normalize(fp32(features), dim=1), F.normalize(fp32(self.weight), dim=1))
        return self.options.scale * cosine + (0 if self.bias is None else self.bias)

    def frozen(self, progress: float) -> Iterable[nn.Parameter]:
        return [self.weight] if self.options.init == "text" and progress < self.options.unfreeze_at else []

    def _known(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of the images of a view: classes it shows, classes it could be said to show (bool [B, K]); does it count."""
        nameable = self.nameable[batch.source]
        positive = batch.labels.bool() & nameable
        counted = batch.labelled & (positive if self.options.kind == "one_of" else nameable).any(dim=1)
        if self.options.view == "clean" and batch.clean_of is not None:  # not every image has a clean view
            return positive[batch.clean_of], nameable[batch.clean_of], counted[batch.clean_of]
        return positive, nameable, counted


def one_of(logits: Tensor, positive: Tensor, nameable: Tensor, smoothing: float = 0.0) -> Tensor:
    """Softmax cross-entropy over the nameable classes: logits [..., B, K], masks [B, K] -> [..., B].

    Several positives share the target. A row without one gives a finite number that means nothing.
    """
    target = positive / positive.sum(dim=1, keepdim=True).clamp_min(1)
    target = (1 - smoothing) * target + smoothing * nameable / nameable.sum(dim=1, keepdim=True).clamp_min(1)
    log_p = F.log_softmax(logits.masked_fill(~nameable, -1e9), dim=-1)  # not -inf: 0 x inf would be NaN
    return -(target * log_p).sum(dim=-1)


def multi(logits: Tensor, positive: Tensor, nameable: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean binary cross-entropy over the nameable classes: logits [..., B, K], masks [B, K] -> [..., B]."""
    target = (positive * (1 - smoothing) + smoothing / 2).expand(logits.shape)
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (losses * nameable).sum(dim=-1) / nameable.sum(dim=1).clamp_min(1)


def _prototypes(options: Options, context: Context) -> Tensor:
    """The first value of the head [K, dim]."""
    shape = (context.classes, context.dim)
    if options.init == "random":
        rows = nn.init.trunc_normal_(torch.empty(shape), std=0.02)
        return F.normalize(rows, dim=1) if options.head == "cosine" else rows
    if context.prototypes is None:
        raise UserError(
            "objectives.labels.init=text needs class prototypes: make them with "
            "`python -m hybridssl prototypes`, or set objectives.labels.init=random"
        )
    if context.prototypes.shape != shape:
        raise UserError(
            f"class prototypes are {list(context.prototypes.shape)}, but the data and the backbone want {list(shape)}: "
            "make them again with `python -m hybridssl prototypes`"
        )
    return F.normalize(context.prototypes.detach().float().cpu(), dim=1).clone()
