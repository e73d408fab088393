"""Stochastic depth (Huang et al. 2016, 1603.09382) that does not compute what it drops.

As in DINOv2 (2304.07193, section 5): a residual branch runs on a random subset of the samples only, and its output is
scaled up by what was left out, so that the expectation is that of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from hybridssl.attention import Layout

SKIP_ABOVE = 0.1  # at lower rates picking samples out and putting them back costs more than it saves (DINOv2's value)


class Draw(NamedTuple):
    """What a residual branch of a pass runs on, and what its output is multiplied by."""

    layout: Layout  # of the tokens that it runs on
    scale: Tensor | None = None  # [t, 1]; None: one
    rows: Tensor | None = None  # [t], which tokens these are; None: all
    samples: tuple[Tensor, ...] = ()  # which samples of each length; empty: all


def rate(drop: nn.Module) -> float:
    """The share of samples that timm's `drop` drops at this moment."""
    return drop.drop_prob if isinstance(drop, DropPath) and drop.training else 0.0


def draw(layout: Layout, drop: float, x: Tensor) -> Draw:
    """One branch's draw for tokens x [T, D], from torch's global generator of x's device.

    Below SKIP_ABOVE every sample is computed and dropped with probability `drop`; above, a share 1 - drop of the
    samples of each length is computed, at least one.
    """
    keep, device = 1 - drop, x.device
    if drop <= 0:
        return Draw(layout)
    if drop <= SKIP_ABOVE:
        stay = [x.new_empty(n, 1).bernoulli_(keep).div_(keep).expand(n, length) for n, length in layout]
        return Draw(layout, torch.cat([one.reshape(-1, 1) for one in stay]))
    samples, rows, kept, scales, start = [], [], [], [], 0
    for number, length in layout:
        some = max(round(number * keep), 1)
        samples.append(torch.rand(number, device=device).argsort()[:some])
        rows.append((start + samples[-1][:, None] * length + torch.arange(length, device=device)).flatten())
        scales.append(x.new_full((some * length, 1), number / some))
        kept.append((some, length))
        start += number * length
    return Draw(tuple(kept), torch.cat(scales), torch.cat(rows), tuple(samples))


def residual(x: Tensor, drawn: Draw, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """x + branch(x) where `drawn` computes it, x elsewhere. x: [T, D]."""
    # Not x[rows], whose gradient a GPU sorts first, in case a row comes twice.
    out = branch(x if drawn.rows is None else x.index_select(0, drawn.rows))
    out = out if drawn.scale is None else out * drawn.scale
    return x + out if drawn.rows is None else x.index_add(0, drawn.rows, out.to(x.dtype))
