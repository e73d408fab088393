"""One training step of self-distillation, by us and by others, on the same crops: what benchmarks/step.py times.

Each contestant is a function of (Setting, device) that builds its models and returns a step without arguments. All see
the same architecture, crop sizes, number of prototypes and precision, DINO + iBOT + KoLeo with a mask on half of the
global views, AdamW, clipping and a moving average. None decodes or crops; ours also applies the colours, which the
others do in their loaders' workers. Here are the floor and ours; the others are in peers.py.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hybridssl import backbone as backbones
from hybridssl import efficiency, masks, optim, student
from hybridssl.objectives import Context, build, dino, ibot, spread
from hybridssl.student import Student
from hybridssl.types import Batch
from hybridssl.views import Item, ViewOptions, collate, crop, generator, render
from pretrain.guard import Guard, GuardOptions, Unchanged

Step = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """What is trained on what."""

    name: str  # of a timm vision transformer
    embed: int
    depth: int
    heads: int
    global_size: int
    local_size: int
    local_count: int
    batch: int
    prototypes: int
    precision: str = "no"
    patch: int = 16

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def patches(self) -> int:
        return (self.global_size // self.patch) ** 2


def crops(setting: Setting, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Global [2B, 3, G, G] and local [L * B, 3, g, g] crops as floats, and masks [2B, P]."""
    g = torch.Generator().manual_seed(0)
    shape = (2 * setting.batch, 3, setting.global_size, setting.global_size)
    small = (setting.local_count * setting.batch, 3, setting.local_size, setting.local_size)
    side, rng = setting.global_size // setting.patch, np.random.default_rng(0)
    shares = np.linspace(0.1, 0.5, setting.batch)
    counts = [0] * setting.batch + [max(1, round(share * side * side)) for share in shares]
    drawn = np.stack([masks.draw_mask(rng, (side, side), count, "block") for count in counts])
    hidden = torch.from_numpy(drawn[rng.permutation(len(drawn))])
    return torch.randn(shape, generator=g).to(device), torch.randn(small, generator=g).to(device), hidden.to(device)


def network(setting: Setting) -> backbones.BackboneOptions:
    args = {"embed_dim": setting.embed, "depth": setting.depth, "num_heads": setting.heads, "init_values": 1e-5}
    return backbones.BackboneOptions(setting.name, args)


def backbone(setting: Setting) -> backbones.Backbone:
    return backbones.build(network(setting), 3, setting.global_size)


def floor(setting: Setting, device: torch.device) -> Step:
    """The bare compute: the student forward and backward on all crops, the teacher forward on the global ones."""
    torch.manual_seed(0)
    mine = backbone(setting).to(device)
    teacher = copy.deepcopy(mine).eval().requires_grad_(False)
    large, small, hidden = crops(setting, device)

    def step() -> None:
        with setting.autocast(device):
            with torch.no_grad():
                teacher(large)
            loss = mine(large, hidden).cls.float().sum() + mine(small).cls.float().sum()
        loss.backward()
        mine.zero_grad(set_to_none=True)

    return step


def ours(setting: Setting, device: torch.device) -> Step:
    """The step of pretrain/loop.py between two log points, from a collated batch on the device to the new teacher."""
    torch.manual_seed(0)
    net, size = backbone(setting), setting.prototypes
    objectives = {
        "dino": dino.Options(prototypes=size),
        "ibot": ibot.Options(prototypes=size),
        "spread": spread.Options(weight=0.1),
    }
    context = Context(
        dim=net.dim,
        classes=0,
        named=torch.zeros(0, 0, dtype=torch.bool),
        steps=1000,
        batch=setting.batch,
        micro=setting.batch,
        patch=setting.patch,
        patches=setting.patches(),
    )
    learner = Student(net, build(objectives, context)).to(device)
    teacher = student.make_teacher(learner)
    for one in (learner, teacher):
        efficiency.apply(one.backbone, efficiency.EfficiencyOptions())
    options = optim.OptimOptions()
    optimizer = optim.build(learner.backbone, learner.objectives, options)
    views = ViewOptions(setting.global_size, setting.local_size, setting.local_count)
    batch = _batch(setting, views).to(device)
    guard = Guard(GuardOptions(), device)

    def step() -> None:
        optim.set_hyperparameters(optimizer, options, setting.batch, 0.5)
        seen = render(batch, views)
        unchanged = Unchanged(learner, teacher)
        with setting.autocast(device):
            (targets,) = student.targets(teacher, [seen], [batch], 0.5)
            losses, _ = learner(seen, targets, batch, 0.5)
            loss = torch.stack([losses[name] * objectives[name].weight for name in losses]).sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(learner.parameters(), options.clip)
        refused = guard.judge(guard.at + 1, loss, norm, 0, batch.keys)
        optimizer.found_inf = refused  # type: ignore[attr-defined]
        optimizer.step()
        student.update_teacher(teacher, learner, 0.996, refused)
        unchanged.keep(refused)
        optimizer.zero_grad(set_to_none=True)

    return step


def _batch(setting: Setting, options: ViewOptions) -> Batch:
    """A real one, cut from noise by the loader's own code."""
    side, items = 2 * setting.global_size, []
    for i in range(setting.batch):
        rng = generator(0, 0, i)
        image = rng.integers(0, 256, (side, side, 3), np.uint8)
        cut = crop(image, rng, options, setting.patch, i, clean=False)
        items.append(Item(cut, np.zeros(0, np.uint8), -1, False, "", str(i)))
    return collate(items)
