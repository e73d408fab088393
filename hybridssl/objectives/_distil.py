"""What DINO and iBOT share: a prototype head, a teacher temperature that warms up, and balanced targets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from hybridssl.assign import Centre, sinkhorn
from hybridssl.heads import Head
from hybridssl.objectives import Context, Objective, ObjectiveOptions


@dataclass(frozen=True)
class DistilOptions(ObjectiveOptions):
    prototypes: int = 4096  # K: 1k to 8k serve small data, 65,536 and more serve millions of images
    hidden: int = 2048  # width of the head's MLP
    bottleneck: int = 256  # width of the unit vectors that meet the prototypes
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    teacher_temperature_start: float = 0.04
    temperature_warmup: float = 0.3  # share of the run over which the teacher's temperature rises linearly
    centering: Literal["sinkhorn", "mean"] = "sinkhorn"
    centre_momentum: float = 0.9  # of mean centering
    freeze_last: float = 0.01  # share of the run for which the prototypes do not move


class Distil(Objective):
    """Base of the objectives in which a student matches a teacher's distribution over prototypes."""

    options: DistilOptions
    taught = True

    def __init__(self, options: DistilOptions, context: Context) -> None:
        super().__init__(options, context)
        self.head = Head(context.dim, options.prototypes, options.hidden, options.bottleneck)
        self.centre = Centre(options.prototypes, options.centre_momentum) if options.centering == "mean" else None

    def temperature(self, progress: float) -> float:
        """The teacher's temperature at this share of the run."""
        o = self.options
        risen = min(1.0, progress / o.temperature_warmup) if o.temperature_warmup > 0 else 1.0
        return o.teacher_temperature_start + (o.teacher_temperature - o.teacher_temperature_start) * risen

    def schedules(self, progress: float) -> dict[str, float]:
        return {"temperature": self.temperature(progress)}

    def assign(self, tokens: Tensor, progress: float) -> Tensor:
        """Targets [N, K] of teacher tokens [N, D], balanced over all N of all processes."""
        scores, temperature = self.head(tokens), self.temperature(progress)
        return self.centre(scores, temperature) if self.centre is not None else sinkhorn(scores, temperature)

    def frozen(self, progress: float) -> Iterable[nn.Parameter]:
        return [self.head.prototypes] if progress < self.options.freeze_last else []
