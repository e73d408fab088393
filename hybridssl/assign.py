"""From the teacher's scores to target distributions, balanced over the prototypes so that nothing collapses.

Both ways see the whole effective batch: all rows of this process, and by all-reduced sums those of the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridssl.dist import all_reduce_max, all_reduce_sum
from hybridssl.heads import fp32


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Soft assignments [N, K] of `scores` [N, K]: rows sum to one, columns about equal over the global N.

    Sinkhorn-Knopp on exp(scores / temperature), as in SwAV (arXiv 2006.09882, section 3.1) and DINOv2: columns
    (prototypes) first, rows (samples) last. The constants 1/K and 1/N of the papers cancel in the next division
    and are left out. N may differ between processes and may be 0 on some.
    """
    scores = fp32(scores) / temperature
    top = scores.max() if len(scores) else scores.new_tensor(-torch.inf)
    q = torch.exp(scores - all_reduce_max(top))
    tiny = torch.finfo(q.dtype).tiny  # an entry may underflow to zero; a whole row or column of them must not be NaN
    for _ in range(iterations):
        q /= all_reduce_sum(q.sum(dim=0)).clamp_min(tiny)
        q /= q.sum(dim=1, keepdim=True).clamp_min(tiny)
    return q


class Centre(nn.Module):
    """Mean centering (DINO, arXiv 2104.14294, eq. 4): softmax((scores - centre) / T), the centre a running mean.

    The centre is a buffer of the teacher's copy: it is saved with the teacher and never averaged with the student's.
    """

    value: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(prototypes))

    @torch.no_grad()
    def forward(self, scores: Tensor, temperature: float) -> Tensor:
        """Targets [N, K] of `scores` [N, K] with the centre as it was; then the centre moves."""
        scores = fp32(scores)
        targets = F.softmax((scores - self.value) / temperature, dim=1)
        count = all_reduce_sum(scores.new_tensor(float(len(scores))))
        mean = all_reduce_sum(scores.sum(dim=0)) / count.clamp_min(1)
        step = (1 - self.momentum) * (count > 0)  # no row anywhere: the centre stays
        self.value.lerp_(mean.to(self.value.dtype), step.to(self.value.dtype))
        return targets
