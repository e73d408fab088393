"""What DINO and iBOT share: a prototype head, a teacher temperature that warms up, and balanced targets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hybridssl.assign import Centre, sinkhorn
from hybridssl.fused import Targets, kept
from hybridssl.heads import Head
from hybridssl.objectives import Context, Objective, ObjectiveOptions
from hybridssl.schedule import ramp


@dataclass(frozen=True)
class DistilOptions(ObjectiveOptions):
    prototypes: int = 4096  # K: 1k to 8k serve small data, 65,536 and more serve millions of images
    hidden: int = 2048  # width of the head's MLP
    bottleneck: int = 256  # width of the unit vectors that meet the prototypes
    student_temperature: float = 0.1  # by which the student's cosines are divided
    teacher_temperature: float = 0.07  # by which the teacher's are, after the warm-up; lower is sharper
    teacher_temperature_start: float = 0.04  # and at the start
    temperature_warmup: float = 0.3  # share of the run from `start` on over which the teacher's temperature rises
    centering: Literal["sinkhorn", "mean"] = "sinkhorn"  # what keeps all prototypes in use (DINOv2; DINO)
    centre_momentum: float = 0.9  # of mean centering
    freeze_last: float = 0.01  # share of the run, from `start` on, for which the prototypes do not move


class Distil(Objective):
    """Base of the objectives in which a student matches a teacher's distribution over prototypes."""

    options: DistilOptions
    taught = True

    def __init__(self, options: DistilOptions, context: Context) -> None:
        super().__init__(options, context)
        self.since = options.start  # when its head begins, which its shares count from: a late one begins no later
        self.head = Head(context.dim, options.prototypes, options.hidden, options.bottleneck)
        self.centre = Centre(options.prototypes, options.centre_momentum) if options.centering == "mean" else None

    def temperature(self, progress: float) -> float:
        """The teacher's temperature at this share of the run."""
        o = self.options
        risen = ramp(o.temperature_warmup, progress, self.since)
        return o.teacher_temperature_start + (o.teacher_temperature - o.teacher_temperature_start) * risen

    def schedules(self, progress: float) -> dict[str, float]:
        return {"temperature": self.temperature(progress)}

    def assign(self, tokens: Sequence[Tensor], views: int, progress: float) -> list[Targets]:
        """Targets of the teacher's tokens [views * n, D] of each micro-batch, balanced over all of all processes."""
        z = [self.head.bottleneck(rows).unflatten(0, (views, -1)) for rows in tokens]
        whole, weight, temperature = torch.cat(z, dim=1), self.head.weight, self.temperature(progress)
        rows, at_hand = whole.flatten(0, 1), None
        if self.centre is not None:
            bias = self.centre(rows, weight, temperature)
        else:
            scores = kept(rows, weight, temperature)
            bias = sinkhorn(rows, weight, temperature, kept=scores)
            at_hand = None if scores is None else scores.unflatten(0, whole.shape[:2])
        return Targets(whole, weight, temperature, bias[None], at_hand).split([part.shape[1] for part in z])

    def frozen(self, progress: float) -> Iterable[nn.Parameter]:
        return [self.head.prototypes] if progress < self.since + self.options.freeze_last else []


def crossing(crops: int, local_weight: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Which global views each crop predicts, two global crops first: their mix [crops, 2], and weights [crops, 1].

    A global crop predicts the other global view. A local crop predicts both, twice the mean of the two since
    cross-entropy is linear in its target, times `local_weight`. Over the number of pairs, whatever the weight.
    """
    mix = like.new_full((crops, 2), 0.5)
    mix[:2] = torch.eye(2, device=like.device).flip(0)  # not from a list, for which a device would be waited for
    weights = like.new_full((crops, 1), 2 * local_weight)
    weights[:2] = 1.0
    return mix, weights / (2 * crops - 2)
