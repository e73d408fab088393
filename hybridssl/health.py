"""Is it learning, or collapsing? Figures for the log points, each a pure function of tensors. Entropies are in nats.

How to read them together: target entropy near ln K means that the targets say nothing yet; near zero with a usage
near its floor means collapse onto a few prototypes. Agreement of 1 is good news only while usage is high.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy(distribution: Tensor) -> Tensor:
    """Shannon entropy over the last dimension: [..., K] -> [...]."""
    return torch.special.entr(distribution).sum(dim=-1)


def target_entropy(targets: Tensor) -> Tensor:
    """Mean over samples of the entropy of each target, [N, K] -> scalar: how undecided the teacher is."""
    return entropy(targets).mean()


def marginal_entropy(targets: Tensor) -> Tensor:
    """Entropy of the mean target, [N, K] -> scalar: ln K when all prototypes are used alike, 0 when only one is."""
    return entropy(targets.mean(dim=0))


def max_entropy(targets: Tensor) -> Tensor:
    """ln K, the ceiling of both entropies."""
    return targets.new_tensor(math.log(targets.shape[-1]))


def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Share of rows whose student scores [N, K] and teacher targets [N, K] have the same argmax; chance is 1 / K.

    Pass the student's scores of one view beside the targets of the other, so that it measures what is learnt.
    """
    return (student.argmax(dim=1) == teacher.argmax(dim=1)).float().mean()


def prototype_usage(targets: Tensor) -> Tensor:
    """Distinct argmax prototypes over min(N, K), [N, K] -> scalar in (0, 1]: of what N samples could reach, the share.

    Dividing by K alone would report the batch size. Give one view an image: two views of it ought to agree. The
    argmax, because Sinkhorn keeps the mean target flat even when all samples have become one.
    """
    used = torch.zeros_like(targets[0]).index_fill_(0, targets.argmax(dim=1), 1.0)
    return used.sum() / min(targets.shape)


def of_targets(targets: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """All of the above for the targets [2, B, K] and the student's scores [2, B, K] of two views of B images."""
    flat = targets.flatten(0, 1)
    return {
        "target_entropy": target_entropy(flat),
        "marginal_entropy": marginal_entropy(flat),
        "max_entropy": max_entropy(flat),
        "agreement": agreement(scores.flatten(0, 1), targets.flip(0).flatten(0, 1)),
        "prototype_usage": prototype_usage(targets[0]),
    }


def rankme(features: Tensor, eps: float = 1e-7) -> Tensor:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885, eq. 1-2): exp of the entropy of the singular values' shares.

    features [N, D] -> scalar from 1 (everything on one line) to min(N, D): the effective number of dimensions; NaN
    without any feature, or where one is not finite (torch would raise, and a run that can still go back would end).
    """
    if not len(features):
        return features.new_full((), math.nan, dtype=torch.float32)
    finite = torch.isfinite(features).all()
    sigma = torch.linalg.svdvals(features.detach().float().nan_to_num(0.0, 0.0, 0.0))
    share = sigma / sigma.sum().clamp_min(eps) + eps
    return torch.where(finite, torch.exp(-(share * share.log()).sum()), math.nan)
