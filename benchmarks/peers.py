"""The training steps of others, from their own packages: see contestants.py for what all have in common.

A package that is not installed raises ImportError, with a sentence that says how to get it. Each step asks its feed for
tensors on the device; without one it takes the same crops again and again. The packages' own loaders are in feeds.py.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.contestants import Setting, Step, backbone, crops
from hybridssl import attention

Feed = Callable[[], Sequence[Tensor]]


class Peer(Protocol):
    def __call__(self, setting: Setting, device: torch.device, feed: Feed | None = None) -> Step: ...


def again(*tensors: Tensor) -> Feed:
    return lambda: tensors


@contextmanager
def needed(package: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{package} is not installed ({error}): {remedy}") from None


def lightly(setting: Setting, device: torch.device, feed: Feed | None = None) -> Step:
    """lightly's parts, put together as its documentation does for DINOv2 (mean centering: it has no other).

    feed: global [2B, 3, G, G] and local [L * B, 3, g, g] crops.
    """
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
    feed = feed or again(*crops(setting, device)[:2])
    side = setting.global_size // setting.patch
    prefix: int = mine["backbone"].vit.num_prefix_tokens  # type: ignore[assignment, union-attr]

    def step() -> None:
        large, small = feed()
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


def _transformer(setting: Setting) -> dict[str, Any]:
    """Arguments of DINOv2's transformer, of which lightly-train has a copy."""
    return {
        "img_size": setting.global_size,
        "patch_size": setting.patch,
        "embed_dim": setting.embed,
        "depth": setting.depth,
        "num_heads": setting.heads,
        "init_values": 1e-5,
        "block_chunks": 0,
    }


def lightly_train(setting: Setting, device: torch.device, feed: Feed | None = None) -> Step:
    """The `dinov2` method of lightly-train, its own step and backbone, with Sinkhorn and separate heads like ours.

    feed: views, 2 of [B, 3, G, G] and L of [B, 3, g, g].
    """
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"  # no telemetry
    from lightly.models.utils import update_momentum

    with needed("lightly-train", "pip install lightly-train"):
        from lightly_train._methods.dinov2.dinov2 import DINOv2, DINOv2AdamWViTArgs, DINOv2Args
        from lightly_train._methods.dinov2.utils import get_optimizer_with_decay
        from lightly_train._models.dinov2_vit.dinov2_vit import DINOv2ViTModelWrapper
        from lightly_train._models.dinov2_vit.dinov2_vit_src.models.vision_transformer import DinoVisionTransformer
        from lightly_train._models.embedding_model import EmbeddingModel

    torch.manual_seed(0)
    net = DinoVisionTransformer(**_transformer(setting))
    args = DINOv2Args(output_dim=setting.prototypes, center_method="sinkhorn_knopp", ibot_separate_head=True)
    adamw = DINOv2AdamWViTArgs()
    method = DINOv2(args, adamw, EmbeddingModel(DINOv2ViTModelWrapper(net)), setting.batch, 3).to(device)
    args.weight_decay_start = 0.04
    method._trainer = SimpleNamespace(global_step=50_000)  # type: ignore[assignment]  # all it asks of a trainer
    optimizer = get_optimizer_with_decay(adamw, method.trainable_modules(), args.layerwise_decay, 0.2)
    if feed is None:
        large, small, _ = crops(setting, device)
        feed = again(*large.chunk(2), *small.chunk(setting.local_count))

    def step() -> None:
        batch: Any = {"views": list(feed())}
        with setting.autocast(device):
            loss = method.training_step_impl(batch, 0).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 3.0)
        optimizer.step()
        update_momentum(method.student_embedding_model, method.teacher_embedding_model, m=0.996)
        update_momentum(method.student_head, method.teacher_head, m=0.996)
        optimizer.zero_grad(set_to_none=True)

    return step


def dinov2(setting: Setting, device: torch.device, feed: Feed | None = None) -> Step:
    """DINOv2's own networks, heads, losses and Sinkhorn (facebookresearch/dinov2), in the order of its training code.

    On a GPU with xformers all crops share a pass, as there; elsewhere the package can only take one size at a time.
    feed: global [2B, 3, G, G] and local [L * B, 3, g, g] crops, masks [2B, P], what is hidden of them as places [M] in
    all patches, and its weights [M]: 1 / hidden patches of the view.
    """
    with needed("dinov2", "clone facebookresearch/dinov2 and put it on PYTHONPATH"):
        from dinov2.layers import DINOHead, MemEffAttention, NestedTensorBlock
        from dinov2.layers.attention import Attention
        from dinov2.layers.block import XFORMERS_AVAILABLE
        from dinov2.loss import DINOLoss, KoLeoLoss, ibot_patch_loss
        from dinov2.models.vision_transformer import DinoVisionTransformer

    # Its Sinkhorn for patches adds up over processes even where there is only one, and has no group then.
    ibot_patch_loss.dist = SimpleNamespace(all_reduce=lambda tensor: None, is_initialized=lambda: False)
    # Installed is not enough: one that was built for another CUDA imports, and then refuses every call.
    nested = XFORMERS_AVAILABLE and device.type == "cuda" and attention.usable(torch.bfloat16, 64, device)
    network = partial(
        DinoVisionTransformer,
        **_transformer(setting),
        block_fn=partial(NestedTensorBlock, attn_class=MemEffAttention if nested else Attention),
    )
    head = partial(DINOHead, setting.embed, setting.prototypes, hidden_dim=2048, bottleneck_dim=256, nlayers=3)
    torch.manual_seed(0)
    mine, teacher = (nn.ModuleDict({"net": network(), "dino": head(), "ibot": head()}).to(device) for _ in range(2))
    teacher.load_state_dict(mine.state_dict())
    teacher.eval().requires_grad_(False)
    dino_loss = DINOLoss(setting.prototypes).to(device)
    ibot_loss = ibot_patch_loss.iBOTPatchLoss(setting.prototypes).to(device)
    koleo = KoLeoLoss()
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-4)
    feed = feed or again(*with_places(*crops(setting, device)))
    terms = 2 + 2 * setting.local_count

    def taught(large: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Targets [2, B, K] of the class tokens, each view's under the other's number, and [M, K] of the patches."""
        seen = teacher["net"](large, is_training=True)
        cls = teacher["dino"](torch.cat(seen["x_norm_clstoken"].chunk(2)[::-1]))
        patches = teacher["ibot"](seen["x_norm_patchtokens"].flatten(0, 1)[places])
        count = torch.full((1,), len(places), device=device)
        return (
            dino_loss.sinkhorn_knopp_teacher(cls, teacher_temp=0.07).unflatten(0, (2, -1)),
            ibot_loss.sinkhorn_knopp_teacher(patches, teacher_temp=0.07, n_masked_patches_tensor=count),
        )

    def seen_by_student(large: Tensor, small: Tensor, masks: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if nested:
            return mine["net"]([large, small], masks=[masks, None], is_training=True)
        return mine["net"](large, masks=masks, is_training=True), mine["net"](small, is_training=True)

    def step() -> None:
        large, small, masks, places, share = feed()
        with setting.autocast(device):
            with torch.no_grad():
                cls_targets, patch_targets = taught(large, places)
            whole, local = seen_by_student(large, small, masks)
            cls = whole["x_norm_clstoken"]
            rows = mine["dino"](torch.cat([local["x_norm_clstoken"], cls]))
            of_local, of_whole = rows.split([len(small), len(large)])
            patches = mine["ibot"](whole["x_norm_patchtokens"].flatten(0, 1)[places])
            loss = dino_loss(of_local.chunk(setting.local_count), cls_targets) / terms
            loss = loss + 2 * dino_loss([of_whole], [cls_targets.flatten(0, 1)]) / terms
            loss = loss + 0.1 * sum(koleo(view) for view in cls.chunk(2))
            loss = loss + ibot_loss.forward_masked(
                patches, patch_targets, student_masks_flat=masks, n_masked_patches=len(places), masks_weight=share
            )
        loss.backward()
        nn.utils.clip_grad_norm_(mine.parameters(), 3.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(mine.parameters()), 1 - 0.996)
        optimizer.zero_grad(set_to_none=True)

    return step


def with_places(large: Tensor, small: Tensor, masks: Tensor) -> tuple[Tensor, ...]:
    """What DINOv2's collate adds to crops and masks."""
    places = masks.flatten().nonzero()[:, 0]
    share = (1 / masks.sum(dim=1).clamp(min=1))[:, None].expand_as(masks)[masks]
    return large, small, masks, places, share


PEERS: dict[str, Peer] = {
    "lightly's parts": lightly,
    "lightly-train": lightly_train,
    "DINOv2": dinov2,
}
