"""The student: a backbone and the objectives with their heads, as one module; and the teacher, its moving average."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from hybridssl import sharding, short
from hybridssl.backbone import Backbone, Crops
from hybridssl.cnn import follow_statistics
from hybridssl.errors import UserError
from hybridssl.health import rankme
from hybridssl.objectives import Objective
from hybridssl.types import Batch, Tokens, Views, ViewTokens


class Student(nn.Module):
    """Everything that is trained. One `forward` holds the whole student side of a step, so DDP sees one call."""

    def __init__(self, backbone: Backbone, objectives: nn.ModuleDict) -> None:
        super().__init__()
        self.backbone = backbone
        self.objectives = objectives
        self.views = frozenset().union(*(o.views for o in self.each().values()))
        self.masked = any(o.masked for o in self.each().values())
        hiding = [name for name, o in self.each().items() if o.masked or "visible" in o.views]
        if hiding and not backbone.maskable:
            raise UserError(_cannot_hide(hiding, backbone))
        if backbone.mask_token is not None:
            # DDP waits for the gradient of every parameter that asks for one, so what no objective reaches must not.
            backbone.mask_token.requires_grad_(self.masked)

    def each(self) -> dict[str, Objective]:
        return dict(self.objectives.items())  # type: ignore[arg-type]

    def forward(
        self, views: Views, targets: dict[str, Any], batch: Batch, progress: float, watch: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The unweighted losses of a micro-batch, `objective` or `objective/part`; to `watch`, signs of health too.
        Of objectives that have started."""
        started = self.started(progress)
        shortened = batch if batch.short else None
        tokens = self.look(views, batch.masks.flatten(0, 1), batch.unmasked, shortened, list(started.values()))
        losses, health = {}, {}
        for name, objective in started.items():
            for part, loss in objective(tokens, targets[name], batch, progress).items():
                losses[name if part in ("", name) else f"{name}/{part}"] = loss
            if watch:
                with torch.no_grad():
                    health |= {f"health/{k}": v for k, v in objective.health(tokens, targets[name], batch).items()}
        if watch:
            seen = (tokens.global_, tokens.clean, tokens.visible)
            rows = (t.cls for t in seen if t is not None and len(t.cls))
            health["health/rankme"] = rankme(next(rows, tokens.global_.cls).detach().float())
        if waiting := self.waiting(progress):  # they must hang on the graph, or DDP waits for their gradients
            first = next(iter(losses))
            losses[first] = losses[first] + 0 * sum(p.sum() for p in waiting if p.requires_grad)
        return losses, health

    def started(self, progress: float) -> dict[str, Objective]:
        """The objectives that take part at this point of the run."""
        return {name: objective for name, objective in self.each().items() if objective.started(progress)}

    def reaching(self, progress: float) -> list[Objective]:
        """Those of them whose losses move the backbone."""
        return [objective for objective in self.started(progress).values() if objective.reaches(progress)]

    def waiting(self, progress: float) -> list[nn.Parameter]:
        """What no loss reaches until its objective has started: heads, and the mask token where nothing hides yet."""
        started = self.started(progress)
        resting = [p for name, objective in self.each().items() if name not in started for p in objective.parameters()]
        hiding = any(objective.masked for objective in started.values())
        token = self.backbone.mask_token
        return resting if token is None or hiding or not self.masked else [*resting, token]

    def look(
        self,
        views: Views,
        masks: Tensor | None = None,
        unmasked: int | None = None,
        shortened: Batch | None = None,
        objectives: Sequence[Objective] | None = None,
    ) -> ViewTokens:
        """Tokens of the views that `objectives` use (None: all). masks: bool [2B, P], patches of the global views to
        hide; unmasked: see `Batch.unmasked`; shortened: the batch, where some of its global views leave patches out.

        Global and clean views have one size and lie together; views that nobody uses cost nothing and have 0 rows.
        """
        asking = list(self.each().values()) if objectives is None else objectives
        needed = frozenset[str]().union(*(objective.views for objective in asking))
        hiding = masks if any(objective.masked for objective in asking) else None  # or nothing is hidden
        crops: dict[str, Crops] = {}
        if "visible" in needed and masks is not None:
            crops["visible"] = Crops(views.global_, masks, left_out=True, unmasked=unmasked)
        whole = {"global": views.global_, "clean": views.clean}
        shown = {name: images for name, images in whole.items() if name in needed and images is not None}
        if shown:
            crops["whole"] = Crops(torch.cat(list(shown.values())), _hidden(shown, hiding))
            if shortened is not None and "global" in shown:
                crops |= short.parted(crops.pop("whole"), shortened)
        elif not crops:  # tokens that hang on the graph nevertheless, or DDP waits for the backbone's gradients
            crops["nothing"] = Crops(views.global_[:1])
        if "local" in needed and views.local is not None:
            crops["local"] = Crops(views.local)
        seen = dict(zip(crops, self.backbone.see(list(crops.values())), strict=True))
        tokens = seen["whole"] if "whole" in seen else next(iter(seen.values()))[:0]
        if shortened is not None and "short" in seen:
            tokens = short.joined(seen, shortened)
        split = len(shown.get("global", ()))
        return ViewTokens(tokens[:split], seen.get("local"), tokens[split:], views, seen.get("visible"))


def _hidden(shown: Mapping[str, Tensor], masks: Tensor | None) -> Tensor | None:
    """The masks of the global views, and none for the clean ones that lie behind them."""
    if masks is None or "global" not in shown:
        return None
    return torch.cat([masks, *(masks.new_zeros(len(shown[n]), masks.shape[1]) for n in shown if n == "clean")])


def _cannot_hide(objectives: Sequence[str], backbone: Backbone) -> str:
    names = ", ".join(f"objectives.{name}" for name in objectives)
    off = " ".join(f"objectives.{name}=null" for name in objectives)
    about: Any = backbone.model.pretrained_cfg
    return (
        f"{names}: hides patch tokens, which {about['architecture']} does not have: leave it out ({off}) or choose a "
        "vision transformer such as backbone.name=vit_small_patch16_224"
    )


def make_teacher(student: Student) -> Student:
    """A copy that is never trained: eval mode (no stochastic depth), no gradients."""
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    for objective in teacher.each().values():
        objective.begin(teacher.backbone)
    return teacher


@torch.no_grad()
def targets(
    teacher: Student, views: Sequence[Views], batches: Sequence[Batch], progress: float
) -> list[dict[str, Any]]:
    """What the teacher asks of the student, per micro-batch and objective that has started.

    All micro-batches of a step go in together, because assignment (Sinkhorn) and normalising counts cover the
    effective batch. The teacher sees the global views alone, whole.
    """
    started = teacher.started(progress)
    needed = any(objective.taught for objective in started.values())
    seen = [teacher.backbone(v.global_) if needed else _no_tokens(v, teacher.backbone) for v in views]
    tokens = [ViewTokens(t, views=v) for t, v in zip(seen, views, strict=True)]
    with sharding.gathered(teacher.each().values()):  # all at once: one may use another's head
        by_name = {name: o.targets(tokens, list(batches), progress) for name, o in started.items()}
    return [{name: values[i] for name, values in by_name.items()} for i in range(len(batches))]


def _no_tokens(views: Views, backbone: Backbone) -> Tokens:
    empty = views.global_.new_zeros(0, backbone.dim)
    return Tokens(empty, empty[:, None], empty[:, None])


@torch.no_grad()
def update_teacher(teacher: Student, student: Student, momentum: float, refused: Tensor | None = None) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, by parameter (mean teacher, 1703.01780).

    refused: float32 scalar on the device, 1 where the step was not taken and 0 where it was: of a refused one the
    teacher's parameters take nothing.

    The running statistics of batch norms follow too. Other buffers (a running centre, say) and what the student does
    not have (an earlier backbone) stay as they are.
    """
    followers = dict(teacher.named_parameters())
    # What rests (the weights under low-rank updates) is the same in both. Sharded models have the same parts.
    pairs = [(followers[name], p) for name, p in student.named_parameters() if p.requires_grad]
    mine, theirs = ([sharding.local(pair[i]) for pair in pairs] for i in (0, 1))
    _follow(mine, theirs, momentum, torch.zeros((), device=mine[0].device) if refused is None else refused)
    follow_statistics(teacher, student, momentum)


def _follow(mine: list[Tensor], theirs: list[Tensor], momentum: float, refused: Tensor) -> None:
    """mine <- momentum * mine + (1 - momentum) * theirs, unless `refused`, which the host does not know yet."""
    if momentum > 0.5:
        # A step down the slope of |mine - theirs|^2 / 2. Its fused kernel asks on the device whether to take it, does
        # many tensors at once and needs no copy of them; an average with a weight on the device is a kernel a tensor.
        how = {"lr": 1.0 - momentum, "weight_decay": 1.0, "maximize": True}
        plain = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
        sgd(mine, theirs, [None] * len(mine), fused=True, found_inf=refused, **how, **plain)  # type: ignore[arg-type]
    else:  # where rounding would show: without momentum the teacher is the student, to the last bit
        weight = torch.where(refused > 0, 0.0, 1.0 - momentum)
        torch._foreach_lerp_(mine, theirs, [weight] * len(mine))
