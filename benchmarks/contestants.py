"""One training step of self-distillation, by us and by others, on the same crops: what benchmarks/step.py times.

Each contestant is a function of (Setting, device) that builds its models and returns a step without arguments. All see
the same architecture, crop sizes, number of prototypes and precision, DINO + iBOT + KoLeo with a mask on half of the
global views, AdamW, clipping and a moving average. None decodes or crops; ours also applies the colours, which the
others do in their loaders' workers. A peer that is not installed raises ImportError.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm.layers
import torch
from torch import Tensor, nn

from hybridssl import backbone as backbones
from hybridssl import efficiency, masks, optim, student
from hybridssl.objectives import Context, build, dino, ibot, spread
from hybridssl.student import Student
from hybridssl.types import Batch
from hybridssl.views import Item, ViewOptions, collate, crop, generator, render

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


def backbone(setting: Setting) -> backbones.Backbone:
    args = {"embed_dim": setting.embed, "depth": setting.depth, "num_heads": setting.heads, "init_values": 1e-5}
    return backbones.build(backbones.BackboneOptions(setting.name, args), 3, setting.global_size)


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
    """The step of pretrain/loop.py, from a collated batch on the device to the new teacher."""
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

    def step() -> None:
        optim.set_hyperparameters(optimizer, options, setting.batch, 0.5)
        seen = render(batch, views)
        with setting.autocast(device):
            (targets,) = student.targets(teacher, [seen], [batch], 0.5)
            losses, _ = learner(seen, targets, batch, 0.5)
            loss = sum(losses[name] * objectives[name].weight for name in losses)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), options.clip)
        optimizer.step()
        student.update_teacher(teacher, learner, 0.996)
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


def lightly(setting: Setting, device: torch.device) -> Step:
    """lightly's parts, put together as its documentation does for DINOv2 (mean centering: it has no other)."""
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import random_block_mask, update_momentum

    torch.manual_seed(0)
    make_head = lambda: DINOProjectionHead(setting.embed, 2048, 256, setting.prototypes, batch_norm=False)  # noqa: E731
    mine = nn.ModuleDict(
        {
            "backbone": MaskedVisionTransformerTIMM(vit=backbone(setting).model, antialias=False),  # type: ignore[arg-type]
            "dino": make_head(),
            "ibot": make_head(),
        }
    ).to(device)
    teacher = nn.ModuleDict({"backbone": copy.deepcopy(mine["backbone"]), "dino": make_head(), "ibot": make_head()})
    teacher.load_state_dict(mine.state_dict())  # copy.deepcopy refuses weight-normed heads
    teacher.to(device).eval().requires_grad_(False)
    dino_loss, ibot_loss = DINOLoss(setting.prototypes).to(device), IBOTPatchLoss(setting.prototypes).to(device)
    koleo = KoLeoLoss()
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-4)
    large, small, _ = crops(setting, device)
    side = setting.global_size // setting.patch
    prefix: int = mine["backbone"].vit.num_prefix_tokens  # type: ignore[assignment, union-attr]

    def step() -> None:
        with setting.autocast(device):
            with torch.no_grad():
                taught = teacher["backbone"].encode(large)  # type: ignore[operator]
                mask = large.new_zeros((len(large), prefix + side * side), dtype=torch.bool)
                blocks = random_block_mask((len(large), side, side), min_num_masks_per_block=1, device=device)
                mask[:, prefix:] = blocks.flatten(1)
                teacher_cls, teacher_patches = teacher["dino"](taught[:, 0]), teacher["ibot"](taught[mask])
            seen = mine["backbone"].encode(large, mask=mask)  # type: ignore[operator]
            student_cls = [mine["dino"](seen[:, 0]), mine["dino"](mine["backbone"].encode(small)[:, 0])]  # type: ignore[operator]
            student_patches = mine["ibot"](seen[mask])
            views = [*student_cls[0].chunk(2), *student_cls[1].chunk(setting.local_count)]
            loss = dino_loss(list(teacher_cls.chunk(2)), views, teacher_temp=0.07)
            loss = loss + ibot_loss(teacher_patches, student_patches, blocks, teacher_temp=0.07)
            loss = loss + 0.1 * sum(koleo(rows) for rows in seen[:, 0].chunk(2))
        loss.backward()
        nn.utils.clip_grad_norm_(mine.parameters(), 3.0)
        optimizer.step()
        update_momentum(mine, teacher, 0.996)
        optimizer.zero_grad(set_to_none=True)

    random.seed(0)
    return step


def lightly_train(setting: Setting, device: torch.device) -> Step:
    """The `dinov2` method of lightly-train, its own step and backbone, with Sinkhorn and separate heads like ours."""
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"  # no telemetry
    from lightly.models.utils import update_momentum
    from lightly_train._methods.dinov2.dinov2 import DINOv2, DINOv2AdamWViTArgs, DINOv2Args
    from lightly_train._methods.dinov2.utils import get_optimizer_with_decay
    from lightly_train._models.dinov2_vit.dinov2_vit import DINOv2ViTModelWrapper
    from lightly_train._models.dinov2_vit.dinov2_vit_src.models.vision_transformer import DinoVisionTransformer
    from lightly_train._models.embedding_model import EmbeddingModel

    torch.manual_seed(0)
    net = DinoVisionTransformer(
        img_size=setting.global_size,
        patch_size=setting.patch,
        embed_dim=setting.embed,
        depth=setting.depth,
        num_heads=setting.heads,
        init_values=1e-5,
        block_chunks=0,
    )
    args = DINOv2Args(output_dim=setting.prototypes, center_method="sinkhorn_knopp", ibot_separate_head=True)
    adamw = DINOv2AdamWViTArgs()
    method = DINOv2(args, adamw, EmbeddingModel(DINOv2ViTModelWrapper(net)), setting.batch, 3).to(device)
    args.weight_decay_start = 0.04
    method._trainer = SimpleNamespace(global_step=50_000)  # type: ignore[assignment]  # all it asks of a trainer
    optimizer = get_optimizer_with_decay(adamw, method.trainable_modules(), args.layerwise_decay, 0.2)
    large, small, _ = crops(setting, device)
    batch: Any = {"views": [*large.chunk(2), *small.chunk(setting.local_count)]}

    def step() -> None:
        with setting.autocast(device):
            loss = method.training_step_impl(batch, 0).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 3.0)
        optimizer.step()
        update_momentum(method.student_embedding_model, method.teacher_embedding_model, m=0.996)
        update_momentum(method.student_head, method.teacher_head, m=0.996)
        optimizer.zero_grad(set_to_none=True)

    return step


CONTESTANTS: dict[str, Callable[[Setting, torch.device], Step]] = {
    "floor": floor,
    "ours": ours,
    "lightly's parts": lightly,
    "lightly-train": lightly_train,
}


@contextlib.contextmanager
def attention(device: torch.device) -> Iterator[None]:
    """timm's attention as the loop sets it on this device: for all who use timm's blocks alike."""
    timm.layers.set_fused_attn(device.type == "cuda")
    try:
        yield
    finally:
        timm.layers.set_fused_attn(True)
