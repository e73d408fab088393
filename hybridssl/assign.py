"""Balancing the teacher's distributions over the prototypes, so that nothing collapses: a bias for each prototype.

Both ways see the whole effective batch: all rows of this process, and by all-reduced sums those of the others. What
they return is the `bias` of `hybridssl.fused.Targets`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridssl.dist import all_reduce_sum
from hybridssl.fused import chunk, exponentials, rounded, rounding
from hybridssl.heads import fp32, linear32

# Prototypes whose scores exist at once. The same on every process, however many rows it has: each chunk is reduced.
COLUMNS = {"cpu": 2048, "cuda": 16384}


@torch.no_grad()
def sinkhorn(
    z: Tensor,
    weight: Tensor,
    temperature: float,
    iterations: int = 3,
    counted: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Log of the scaling [K] that makes exp(z . w / temperature), its rows summing to one, about equal over prototypes.

    Sinkhorn-Knopp, as in SwAV (arXiv 2006.09882, section 3.1) and DINOv2: columns (prototypes) first, rows (samples)
    last. z [N, d] and weight [K, d] have unit rows, so a score never exceeds 1 / temperature, which is taken off before
    the exponential. N may differ between processes and may be 0 on some. counted: bool [N], the rows that take part;
    None: all of them. kept: [N, K], what `hybridssl.fused.kept` says of z and weight; None: it is computed here.

    Only the two scalings are kept. One pass over the scores, prototype by prototype, is one iteration: the scaling of
    a column needs the rows' as they were, and the rows' next sums need nothing but that column.
    """
    low = rounding(z.device)
    z, weight = fp32(z), rounded(fp32(weight), low)
    width = COLUMNS.get(z.device.type, COLUMNS["cpu"])
    parts = [slice(start, start + width) for start in range(0, len(weight), width)]

    tiny = torch.finfo(z.dtype).tiny  # an entry may underflow to zero; a whole row or column of them must not be NaN
    share = z.new_ones(len(z)) if counted is None else counted.to(z.dtype)  # what a row sums to
    mass = all_reduce_sum(share.sum()) / len(weight)  # of a column
    row, column = share, z.new_empty(len(weight))
    with torch.autocast(z.device.type, enabled=False):
        if kept is None and len(z) * len(weight) <= 4 * chunk(z.device):  # few enough to be computed once
            kept = exponentials(z, weight, temperature, low)
        for _ in range(iterations):
            sums = torch.zeros_like(row)
            for part in parts:
                e = exponentials(z, weight[part], temperature, low) if kept is None else kept[:, part]
                column[part] = mass / all_reduce_sum(row @ e).clamp_min(tiny)
                sums += e @ column[part]
            row = share / sums.clamp_min(tiny)
    return column.log()


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
    def forward(self, z: Tensor, weight: Tensor, temperature: float) -> Tensor:
        """Bias [K] for tokens [N, d] and prototypes [K, d], with the centre as it was; then the centre moves."""
        bias = -self.value / temperature
        count = all_reduce_sum(z.new_full((), float(len(z))))
        total = all_reduce_sum(fp32(z).sum(dim=0))  # the mean score is the score of the mean
        mean = linear32(total / count.clamp_min(1), weight)
        step = (1 - self.momentum) * (count > 0)  # no row anywhere: the centre stays
        self.value.lerp_(mean.to(self.value.dtype), step.to(self.value.dtype))
        return bias
