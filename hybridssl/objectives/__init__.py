"""The losses. Each file beside this one is an objective: its `Options`, and one subclass of `Objective`.

A new loss is one new file here and one line in a recipe (`objectives.NAME.weight=1`); nothing is registered.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from hybridssl.backbone import Backbone
from hybridssl.errors import UserError
from hybridssl.types import Batch, Column, ViewTokens


@dataclass(frozen=True)
class ObjectiveOptions:
    weight: float = 1.0  # factor of this loss in the total; 0 leaves the objective out
    start: float = 0.0  # share of the run at which it starts; until then there is no such loss, and no pass for it
    ramp: float = 0.0  # share of the run over which the weight then rises linearly from zero

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise ValueError(f"start={self.start} must be a share of the run, from 0 to below 1")
        if self.start + self.ramp > 1:
            raise ValueError(
                f"ramp={self.ramp} from start={self.start} on would not end within the run: say "
                f"ramp={1 - self.start:g} at most"
            )

    @property
    def table_columns(self) -> dict[str, str]:
        """Columns of the table that it reads from `Batch.meta`: name -> "class", "number" or "" (as it looks)."""
        return {}


@dataclass(frozen=True)
class Context:
    """What an objective may know when it is built: the backbone's width and the vocabulary of the data."""

    dim: int  # D of the tokens
    classes: int  # K, all classes of all sources
    named: Tensor  # bool [S, K]: which classes a source can name
    prototypes: Tensor | None = None  # [K, dim] text embeddings of the classes
    steps: int = 1  # length of the run
    batch: int = 0  # images of an effective batch, over all micro-batches and processes; 0: not known
    micro: int = 0  # images of a forward pass
    patch: int = 16  # side of a patch in pixels
    patches: int = 196  # P of a global view
    channels: int = 3  # of the images
    names: tuple[str, ...] = ()  # of the K classes
    counts: Tensor | None = None  # [S, K] labels by source and class as the stream draws them
    columns: tuple[Column, ...] = ()  # of Batch.meta
    encoder: str = ""  # the text encoder and its pooling, as the recipe has them
    pooling: str = "auto"


class Objective(nn.Module):
    """A loss, together with the parameters that only it needs (its head).

    To write one, make a file NAME.py in this folder with

        @dataclass(frozen=True)
        class Options(ObjectiveOptions): ...      # its own keys; `weight`, `start`, `ramp` are there already

        class Name(Objective): ...                # `forward`, and what else it needs of the methods below

    Two copies of it live in a run, like the backbone. The **student's** is trained; the **teacher's** follows it by
    EMA (buffers are each copy's own) and never sees a gradient. A step of n micro-batches calls

        targets   once, on the teacher's copy, with all n micro-batches: what is balanced or counted over the
                  batch is so over the effective one. Sums over processes: `hybridssl.dist.all_reduce_sum`
        forward   n times, on the student's copy, with the entry that `targets` made for this micro-batch

    **Scale.** The mean over micro-batches and processes of what `forward` returns is the loss of the whole batch.
    A mean over the images of a micro-batch does that by itself. Where the divisor varies (labelled images, masked
    views), let `targets` count it and return `local_sum * (n * world_size) / global_count`; with nothing to count,
    an exact zero that hangs on the graph, so that no process waits for a gradient that never comes.

    **Precision.** The backbone may run under autocast; compute the loss in float32 (`heads.fp32`, `heads.linear32`).
    """

    views: frozenset[str] = frozenset({"global"})  # of global, local, clean, visible: what `forward` reads
    masked: bool = False  # whether it needs patches of the global views to be hidden
    whole: bool = False  # whether it reads patches of global views that nobody hides: then none may be left out
    taught: bool = False  # whether `targets` looks at the teacher's tokens; if no objective does, they are not computed
    per_class: bool = False  # whether its tensors have a row for each class of the data, in their order
    expects: str = ""  # one plain sentence for the report: what the curve does when all is well

    def __init__(self, options: Any, context: Context) -> None:
        super().__init__()
        self.options = options

    def started(self, progress: float) -> bool:
        """Whether it takes part at this point of the run. Until then the loop calls neither `targets` nor `forward`,
        and its parameters rest as they were built: the step at which it starts is the first of its head."""
        return progress >= self.options.start

    def reaches(self, progress: float) -> bool:
        """Whether its loss moves the backbone at this point of the run, or its own head alone. Where no objective that
        has started does, the loop lets the backbone rest: weight decay would wear it down otherwise."""
        return True

    def meet(self, others: Mapping[str, Objective]) -> None:
        """Called once by `build`, with all objectives by name: what shares a part with another one takes it here."""

    def begin(self, backbone: Backbone) -> None:
        """Called once on the teacher's copy, beside the teacher's backbone as the run starts: what wants to compare
        with an earlier backbone makes its own copy here. It is saved with the teacher and follows nobody."""

    def targets(self, teacher: Sequence[ViewTokens], batches: Sequence[Batch], progress: float) -> list[Any]:
        """One entry a micro-batch, handed to `forward` as `target`. `progress` is the share of the run, 0 to 1."""
        return [None] * len(batches)

    def forward(self, student: ViewTokens, target: Any, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Scalars by name. Their sum, times the weight of the recipe, is what is minimised."""
        raise NotImplementedError

    def frozen(self, progress: float) -> Iterable[nn.Parameter]:
        """Parameters that do not move at this point of the run: the loop sets their gradient to None."""
        return ()

    def schedules(self, progress: float) -> dict[str, float]:
        """What this objective changes over the run by itself, by name, for the log."""
        return {}

    def health(self, student: ViewTokens, target: Any, batch: Batch) -> dict[str, Tensor]:
        """Scalars for the log points, by name; called without gradients on the student's copy."""
        return {}


def options_types() -> dict[str, type[ObjectiveOptions]]:
    """`Options` of every objective, by its name, which is its file's."""
    return {name: _module(name).Options for name in _names()}


def objective_types() -> dict[str, type[Objective]]:
    """The class of every objective, by its name."""
    return {name: _type(name) for name in _names()}


def build(options: Mapping[str, ObjectiveOptions], context: Context) -> nn.ModuleDict:
    """The objectives whose weight is not zero, by name. Raises UserError for a name that has no file here, and where
    none of them starts with the run."""
    made = {name: _type(name)(o, context) for name, o in options.items() if o.weight != 0}
    if not made:
        raise UserError("every objective has weight 0, so nothing would be learnt: give one of them more")
    if not any(objective.started(0.0) for objective in made.values()):
        keys = ", ".join(f"objectives.{name}.start={objective.options.start}" for name, objective in made.items())
        raise UserError(f"nothing would be learnt at first ({keys}): let one of them start at 0")
    for objective in made.values():
        objective.meet(made)
    return nn.ModuleDict(made)


def _names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def _module(name: str) -> ModuleType:
    if name not in _names():
        near = difflib.get_close_matches(name, _names(), 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_names())}"
        raise UserError(f"objectives.{name}: no such objective; {hint}")
    return import_module(f"{__name__}.{name}")


def _type(name: str) -> type[Objective]:
    module = _module(name)
    mine = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    return next(c for c in mine if issubclass(c, Objective))
