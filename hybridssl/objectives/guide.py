"""Guides (FINO): columns of the table, such as age or site of acquisition, that the features keep or forget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridssl.dist import all_reduce_sum, world_size
from hybridssl.errors import UserError
from hybridssl.heads import fp32, linear32
from hybridssl.objectives import Context, Objective, ObjectiveOptions
from hybridssl.types import Batch, Column, ViewTokens

Role = Literal[
    "keep", "keep class", "keep number", "keep prototypes", "remove", "remove class", "remove number"
]  # without a kind: numbers where all values are numbers and there are more than ten of them, else classes

HIDDEN = 256  # width of an adversary: what a linear one cannot find is not gone
TEMPERATURE = 0.1  # of the cosines with EMA prototypes, as in DINO's student
MOMENTUM = 0.9  # of EMA prototypes, per step that shows the class
LARGEST = 10.0  # a guide that has nothing left to say is not amplified beyond this


@dataclass(frozen=True)
class Options(ObjectiveOptions):
    weight: float = 0.1
    ramp: float = 0.3  # features first; a guide that starts at full strength shapes them before there are any
    columns: dict[str, Role] = field(default_factory=dict)  # for example {age: keep, site: remove}; source is one too
    removal: float = 0.1  # strength of removal against keeping: more forgets more, and takes more of the rest along

    @property
    def table_columns(self) -> dict[str, str]:
        kinds = {name: role.partition(" ")[2] for name, role in self.columns.items()}
        return {name: "class" if kind == "prototypes" else kind for name, kind in kinds.items()}


class Target(NamedTuple):
    """For one micro-batch, a value a guide."""

    shares: Tensor  # [M]: turns the sum over the images that have a value into this micro-batch's share of the mean
    strength: Tensor  # [M]: factor of the gradient that reaches the CLS tokens
    centres: list[Tensor | None]  # EMA prototypes [C, D] of the guides that have them
    chance: list[Tensor | None]  # [C] of classes that are to be removed: the loss of one who knows their shares alone


class Guide(Objective):
    """Cross-entropy (classes) or smooth L1 (standardised numbers) of both global CLS tokens with columns of the table.

    The head of each guide learns at full rate. What differs is the gradient that goes on to the backbone: reversed for
    what is to be removed (Ganin & Lempitsky 2015, arXiv 1505.07818), whose head is then an adversary with a hidden
    layer, and multiplied by g / g_k with g_k the norm of guide k's gradient on the CLS tokens of the whole effective
    batch and g the geometric mean over guides: all push equally hard (FINO, a branch of facebookresearch/dinov3). The
    norms are the teacher's, who sees the batch before the student does; so they are the same however it is parted.

    **Forgotten is enough.** Reversed, a cross-entropy has no bound: the backbone would go on to deceive its adversary,
    and did, at the cost of all else (docs/log.md). So only views that the adversary names better than chance are felt:
    with a loss below that of one who knows the shares of the classes in this batch, or the mean of the numbers.

    `keep prototypes` has no head: softmax over the cosines with the mean teacher CLS token of each class, as a moving
    average, for columns of many classes with few images each. An image without a value is skipped by that guide.
    """

    options: Options
    sign: Tensor  # [M]: 1 for what is kept, minus `removal` for what is removed
    taught = True
    expects = (
        "What is kept falls. What is removed falls while the head learns, then climbs back to the level of guessing: "
        "the entropy of the column (classes), about .35 (numbers)."
    )

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        if not options.columns:
            raise UserError("objectives.guide.columns is empty: name some, such as {age: keep, site: remove}")
        place = {column.name: i for i, column in enumerate(context.columns)}
        if missing := [name for name in options.columns if name not in place]:
            raise UserError(
                f"objectives.guide.columns: there is no column '{missing[0]}'; there are {', '.join(place) or 'none'}"
            )
        self.names = list(options.columns)
        self.place = [place[name] for name in self.names]
        roles = options.columns.values()
        self.removed = [role.startswith("remove") for role in roles]
        sign = torch.tensor([-options.removal if removed else 1.0 for removed in self.removed])
        self.register_buffer("sign", sign, persistent=False)
        self.heads = nn.ModuleList(
            _head(role, context.columns[at], context.dim) for role, at in zip(roles, self.place, strict=True)
        )

    def targets(self, teacher: Sequence[ViewTokens], batches: Sequence[Batch], progress: float) -> list[Target]:
        cls = torch.cat([fp32(tokens.global_.cls).unflatten(0, (2, -1)) for tokens in teacher], dim=1)  # [2, N, D]
        values = torch.cat([self._values(batch) for batch in batches])  # [N, M]
        counts = all_reduce_sum((~values.isnan()).sum(dim=0)).clamp_min(1)
        centres = [head.follow(cls, v) if isinstance(head, Centres) else None for head, v in self._each(values)]
        chance = [
            _rarity(v, head.outputs) if removed and type(head) is Classes else None
            for removed, (head, v) in zip(self.removed, self._each(values), strict=True)
        ]
        norms = all_reduce_sum(self._squares(cls, values, counts, centres)).sqrt()
        target = Target(len(batches) * world_size() / counts, self.sign * equalised(norms), centres, chance)
        return [target] * len(batches)

    def forward(self, student: ViewTokens, target: Target, batch: Batch, progress: float) -> dict[str, Tensor]:
        cls = fp32(student.global_.cls).unflatten(0, (2, -1))
        found = {}
        for i, (head, value) in enumerate(self._each(self._values(batch))):
            factor = target.strength[i]
            if self.removed[i]:
                factor = factor * _named(head, cls, value.nan_to_num(0), target.chance[i])[..., None]
            felt = ScaleGradient.apply(cls, factor)
            found[self.names[i]] = _sum(head, felt, value, target.centres[i]) * target.shares[i]
        return found

    def _values(self, batch: Batch) -> Tensor:
        if batch.meta is None:
            raise UserError("objectives.guide: the loader yields no columns")
        columns = batch.meta.unbind(dim=1)
        return torch.stack([columns[at] for at in self.place], dim=1)

    def _each(self, values: Tensor) -> zip[tuple[Any, Tensor]]:
        return zip(self.heads, values.unbind(dim=1), strict=True)

    @torch.enable_grad()
    def _squares(self, cls: Tensor, values: Tensor, counts: Tensor, centres: list[Tensor | None]) -> Tensor:
        """Squared norm [M] of the gradient of each guide's mean loss on the CLS tokens of this process."""
        squares = []
        for (head, value), count, centre in zip(self._each(values), counts, centres, strict=True):
            x = cls.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(_sum(head, x, value, centre) / count, x)
            squares.append(gradient.square().sum())
        return torch.stack(squares)


class ScaleGradient(torch.autograd.Function):
    """The identity; its gradient is multiplied by a factor that broadcasts. A negative one is the gradient reversal
    layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class Classes(nn.Module):
    """[..., D] -> logits of C classes; a number is what one class alone says. `hidden` 0: linear."""

    def __init__(self, dim: int, outputs: int, hidden: int = 0) -> None:
        super().__init__()
        self.outputs, widths = outputs, [dim, hidden, outputs] if hidden else [dim, outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = linear32(F.gelu(x) if i else x, layer.weight, layer.bias)  # type: ignore[arg-type]
        return x

    def losses(self, x: Tensor, value: Tensor, centres: Tensor | None) -> Tensor:
        """x [2, N, D], value [N] -> [2, N]."""
        wanted = value.long().expand(x.shape[:-1])
        return F.cross_entropy(self(x).movedim(-1, 1), wanted, reduction="none")


class Number(Classes):
    """[..., D] -> a standardised number. Smooth L1: reversed, a squared error would pull without bound."""

    def losses(self, x: Tensor, value: Tensor, centres: Tensor | None) -> Tensor:
        return F.smooth_l1_loss(self(x)[..., 0], value.expand(x.shape[:-1]), reduction="none")


class Centres(nn.Module):
    """The mean unit CLS token of each class as the teacher sees it, a moving average. Buffers of the teacher's copy."""

    centres: Tensor  # [C, D]; zero: a class not seen yet

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(outputs, dim))

    @torch.no_grad()
    def follow(self, cls: Tensor, value: Tensor) -> Tensor:
        """Take in the teacher's cls [2, N, D] with value [N], of all processes; -> the centres [C, D] as they are."""
        one_hot = value[:, None] == torch.arange(len(self.centres), device=value.device)  # of a missing value: nothing
        unit = F.normalize(cls, dim=-1).mean(dim=0)
        sums, counts = all_reduce_sum(linear32(one_hot.T.to(unit), unit.T)), all_reduce_sum(one_hot.sum(dim=0))[:, None]
        mean = sums / counts.clamp_min(1)
        moved = torch.where(self.centres.any(dim=1, keepdim=True), self.centres.lerp(mean, 1 - MOMENTUM), mean)
        self.centres.copy_(torch.where(counts > 0, moved, self.centres))
        return self.centres.clone()

    def losses(self, x: Tensor, value: Tensor, centres: Tensor | None) -> Tensor:
        assert centres is not None
        cosine = linear32(F.normalize(x, dim=-1), F.normalize(centres, dim=1)) / TEMPERATURE
        cosine = cosine.masked_fill(~centres.any(dim=1), -1e9)
        return F.cross_entropy(cosine.movedim(-1, 1), value.long().expand(x.shape[:-1]), reduction="none")


def equalised(norms: Tensor) -> Tensor:
    """Factors [M] that bring gradients of these norms to their geometric mean; 1 for a guide without a gradient."""
    pulls = norms > 0
    mean = (torch.where(pulls, norms, 1).log().sum() / pulls.sum().clamp_min(1)).exp()
    return torch.where(pulls, (mean / norms).clamp(max=LARGEST), 1)


def _rarity(value: Tensor, classes: int) -> Tensor:
    """-log of the share [C] of each class among the values [N] of all processes."""
    own = (value[:, None] == torch.arange(classes, device=value.device)).sum(dim=0)  # of a missing value: nothing
    counts = all_reduce_sum(own)
    return -(counts / counts.sum().clamp_min(1)).clamp_min(torch.finfo(torch.float32).tiny).log()


@torch.no_grad()
def _named(head: Any, cls: Tensor, value: Tensor, chance: Tensor | None) -> Tensor:
    """bool [2, N]: which views the adversary names better than chance does. chance: as in Target; None: of numbers."""
    guess = (
        F.smooth_l1_loss(torch.zeros_like(value), value, reduction="none") if chance is None else chance[value.long()]
    )
    return head.losses(cls, value, None) < guess


def _sum(head: Any, cls: Tensor, value: Tensor, centres: Tensor | None) -> Tensor:
    """The loss of cls [2, N, D] with value [N], a sum over images that have one, a mean over views; on the graph."""
    return (head.losses(cls, value.nan_to_num(0), centres).mean(dim=0) * ~value.isnan()).sum()


def _head(role: str, column: Column, dim: int) -> nn.Module:
    if role.endswith("prototypes"):
        return Centres(dim, len(column.values))
    hidden = HIDDEN if role.startswith("remove") else 0
    return Classes(dim, len(column.values), hidden) if column.values else Number(dim, 1, hidden)
