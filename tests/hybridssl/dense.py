"""The textbook versions of what hybridssl.assign and hybridssl.fused never hold whole: N x K at once."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridssl import assign
from hybridssl.fused import Targets


def sinkhorn(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assignments [N, K] of scores [N, K]."""
    q = torch.exp(scores.double() / temperature)
    for _ in range(iterations):
        q /= q.sum(dim=0)
        q /= q.sum(dim=1, keepdim=True)
    return q.to(scores.dtype)


def cross_entropy(z: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """[N] of z [N, d], prototypes [K, d] and targets [N, K]."""
    return -(targets * torch.log_softmax(z @ weight.T / temperature, dim=1)).sum(dim=1)


def assigned(z: Tensor, weight: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Ours, written out: assignments [N, K] of unit rows z [N, d] to unit prototypes [K, d]."""
    bias = assign.sinkhorn(z, weight, temperature, iterations)
    return Targets(z[None], weight, temperature, bias[None]).dense()[0]
