"""The projection head of DINO, iBOT and SwAV, and the precision in which every loss is computed."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fp32(tensor: Tensor) -> Tensor:
    """`tensor` in float32 (float64 stays): the precision of every loss, whatever the backbone ran in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def linear32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear that autocast does not round: x [..., d], weight [K, d] -> [..., K]."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(fp32(x), fp32(weight), bias)


class Head(nn.Module):
    """MLP, unit-norm bottleneck, scores against unit prototypes (DINO, arXiv 2104.14294, section 3 and appendix C).

    The last layer is weight-normed with its norm fixed to one, written as a plain parameter that is normalised on
    use: the same function as torch's weight_norm, and copy.deepcopy and optimisers understand it.
    """

    def __init__(self, dim: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256, layers: int = 3) -> None:
        super().__init__()
        widths = [dim] + [hidden] * (layers - 1) + [bottleneck]
        steps = [step for a, b in pairwise(widths) for step in (nn.Linear(a, b), nn.GELU())]
        self.mlp = nn.Sequential(*steps[:-1])
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)

    @property
    def weight(self) -> Tensor:
        """Unit prototypes [K, bottleneck]."""
        rows = fp32(self.prototypes)
        # What torch's weight_norm calls: one pass forward and one back, where F.normalize takes seven.
        return torch._weight_norm(rows, rows.new_ones(len(rows), 1), 0)

    def bottleneck(self, tokens: Tensor) -> Tensor:
        """tokens [N, dim] -> unit rows [N, bottleneck]."""
        return F.normalize(fp32(self.mlp(tokens)), dim=1)

    def logits(self, z: Tensor) -> Tensor:
        """Cosines [N, K] of bottleneck rows [N, bottleneck] with the prototypes."""
        return linear32(z, self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.bottleneck(tokens))
