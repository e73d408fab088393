"""Cross-entropy between a teacher's and a student's distributions over many prototypes, in the memory of their sum.

K prototypes and N tokens make N x K scores: 65,536 x 4,096 of them are a GiB, and a plain implementation holds several
such tensors. Here neither side ever exists whole. A teacher's distribution is kept as what it is made of (`Targets`),
the loss goes over the tokens in chunks, and each chunk's gradient is computed while its scores are at hand, so nothing
is kept for a backward pass but two tensors of the size of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridssl.heads import fp32

# Scores that exist at once. Small enough for a CPU's cache to be of use, large enough for a GPU to be busy.
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 25}
# Scores that an objective keeps from balancing to the loss, 128 MiB. A GPU computes them again for less.
KEPT = {"cpu": 1 << 25}
COLDEST = 0.025  # a temperature, below which float32 may make a whole row of exponentials zero


def chunk(device: torch.device) -> int:
    return CHUNK.get(device.type, CHUNK["cpu"])


def rounding(device: torch.device) -> torch.dtype | None:
    """What tensor cores round the factors of a product to: autocast's type on CUDA, None elsewhere."""
    return torch.get_autocast_dtype("cuda") if device.type == "cuda" and torch.is_autocast_enabled("cuda") else None


def product(a: Tensor, b: Tensor, low: torch.dtype | None) -> Tensor:
    """a [n, m] @ b [m, k] in float32 (float64 stays); to be called with autocast off.

    With `low` the factors are rounded to it, as they are in every linear layer, but sums and scores never are: a
    bfloat16 cosine over a temperature of 0.04 would be off by a tenth. What is `rounded` already is not copied again.
    """
    if low is not None and a.dtype != torch.float64:
        return torch.mm(a.to(low), b.to(low), out_dtype=torch.float32)
    return torch.mm(a, b)


def rounded(factor: Tensor, low: torch.dtype | None) -> Tensor:
    """A factor of several products as each of them would round it: once."""
    return factor if low is None or factor.dtype == torch.float64 else factor.to(low)


def exponentials(z: Tensor, weight: Tensor, temperature: float, low: torch.dtype | None) -> Tensor:
    """exp((z . w - 1) / temperature) of unit rows [N, d] and [K, d]: [N, K], none above 1. Autocast is to be off."""
    return product(z / temperature, weight.T, low).sub_(1 / temperature).exp_()


def kept(z: Tensor, weight: Tensor, temperature: float) -> Tensor | None:
    """`exponentials` where they are few enough to be computed once, for balancing and for the loss; else None."""
    if len(z) * len(weight) > KEPT.get(z.device.type, 0) or temperature < COLDEST:
        return None
    with torch.autocast(z.device.type, enabled=False):
        return exponentials(fp32(z), fp32(weight), temperature, rounding(z.device))


@dataclass(frozen=True)
class Targets:
    """Distributions softmax(z . w_k / temperature + bias_k) over K prototypes, one for each of N tokens in V views.

    Both ways of balancing end in this form: mean centering subtracts a centre (bias = -centre / temperature), and
    Sinkhorn scales the columns and then the rows (bias = log of the columns' scaling; softmax is the rows').
    """

    z: Tensor  # [V, N, d] unit vectors
    weight: Tensor  # [K, d] unit prototypes
    temperature: float
    bias: Tensor  # [V, K] or [1, K]: of each view, or of all
    kept: Tensor | None = None  # [V, N, K] their `exponentials`, where these are at hand

    def rows(self, which: slice, low: torch.dtype | None = None) -> Tensor:
        """The distributions of tokens `which`: [V, n, K]. `low`: see `product`."""
        if self.kept is not None:
            found = self.kept[:, which] * self.bias.exp()[:, None]
            return found.div_(found.sum(dim=2, keepdim=True))
        z = self.z[:, which]
        scores = product(z.flatten(0, 1) / self.temperature, self.weight.T, low).unflatten(0, z.shape[:2])
        return F.softmax(scores.add_(self.bias[:, None]), dim=2)

    def dense(self) -> Tensor:
        """All of them, [V, N, K]: for tests and for the few rows that a log point looks at."""
        with torch.autocast(self.z.device.type, enabled=False):
            return self.rows(slice(None))

    def split(self, sizes: Sequence[int]) -> list[Targets]:
        """Parted by tokens: one entry a size."""
        kept = [None] * len(sizes) if self.kept is None else self.kept.split(list(sizes), dim=1)
        return [replace(self, z=z, kept=e) for z, e in zip(self.z.split(list(sizes), dim=1), kept, strict=True)]


def cross_entropy(
    z: Tensor, weight: Tensor, targets: Targets, temperature: float, share: Tensor, mix: Tensor | None = None
) -> Tensor:
    """sum_vn share_vn * CE(sum_t mix_vt target_tn, softmax(z_vn . w_k / temperature)): a scalar.

    z [V, N, d] and weight [K, d] carry gradients. targets: [T, N]; mix [V, T]: of which teacher's views student view v
    is to predict the mean, rows summing to one; None: view v of view v. share [V, N]: the weight of each term.
    """
    z, weight = fp32(z), fp32(weight)
    low = rounding(z.device)
    mix = None if mix is None else mix.to(z.dtype)
    with torch.autocast(z.device.type, enabled=False):
        return _CrossEntropy.apply(z, weight, targets, temperature, share.to(z.dtype), mix, low)  # type: ignore[return-value]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        z: Tensor,
        weight: Tensor,
        targets: Targets,
        temperature: float,
        share: Tensor,
        mix: Tensor | None,
        low: torch.dtype | None,
    ) -> Tensor:
        loss, grad_z, grad_weight = z.new_zeros(()), torch.empty_like(z), None
        targets, prototypes = replace(targets, weight=rounded(targets.weight, low)), rounded(weight, low)
        for rows in _chunks(z.shape[1], z.shape[0] * len(weight), z.device):
            wanted = targets.rows(rows, low)
            if mix is not None:
                wanted = torch.tensordot(mix, wanted, 1)
            wanted = wanted.flatten(0, 1)  # [V n, K]
            mine, scale = z[:, rows].flatten(0, 1) / temperature, share[:, rows].reshape(-1, 1)
            log_p = F.log_softmax(product(mine, prototypes.T, low), dim=1)
            loss -= torch.linalg.vecdot(wanted, log_p) @ scale[:, 0]
            gap = rounded(log_p.exp_().sub_(wanted), low)  # the gradient of CE with respect to the scores
            grad_z[:, rows] = (product(gap, prototypes, low) * (scale / temperature)).unflatten(0, (len(z), -1))
            if low is None and grad_weight is not None:
                grad_weight.addmm_(gap.T, mine * scale)  # without another tensor of the prototypes' size
            else:
                moved = product(gap.T, mine * scale, low)
                grad_weight = moved if grad_weight is None else grad_weight.add_(moved)
        ctx.save_for_backward(grad_z, torch.zeros_like(weight) if grad_weight is None else grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_z, grad_weight = ctx.saved_tensors
        return grad_z * upstream, grad_weight * upstream, None, None, None, None, None


def _chunks(count: int, each: int, device: torch.device) -> Iterator[slice]:
    """Slices of range(count) whose items, of `each` scores, are at most a chunk together."""
    size = max(1, chunk(device) // max(each, 1))
    for start in range(0, count, size):
        yield slice(start, start + size)
