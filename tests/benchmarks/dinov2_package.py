"""A package with the interface of facebookresearch/dinov2 as far as benchmarks/peers.py uses it, in a few plain lines.

Written from its interface: names, arguments, shapes and what they mean. Networks are noted as they are made.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import to_tensor

NAMES = ("", ".data", ".layers", ".layers.attention", ".layers.block", ".loss", ".loss.ibot_patch_loss", ".models")
made: list[nn.Module] = []  # networks, in the order in which they were made


class Attention(nn.Module): ...


class MemEffAttention(Attention): ...


class NestedTensorBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, init_values: float, attn_class: type) -> None:
        super().__init__()
        assert attn_class is Attention  # the other one has no kernel on a CPU
        self.mlp, self.gamma = nn.Linear(dim, dim), nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)  # lists want xformers
        return x + self.gamma * self.mlp(x - x.mean(dim=1, keepdim=True))


class DinoVisionTransformer(nn.Module):
    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        init_values: float | None = None,
        block_fn: Any = NestedTensorBlock,
        block_chunks: int = 1,
    ) -> None:
        super().__init__()
        assert block_chunks == 0
        self.patch_embed = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.cls_token, self.mask_token = (nn.Parameter(torch.zeros(1, embed_dim)) for _ in range(2))
        self.blocks = nn.ModuleList(
            block_fn(dim=embed_dim, num_heads=num_heads, init_values=init_values) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        made.append(self)

    def forward(self, x: Tensor, masks: Tensor | None = None, is_training: bool = False) -> dict[str, Tensor]:
        assert is_training
        patches = self.patch_embed(x).flatten(2).mT
        if masks is not None:
            patches = torch.where(masks[..., None], self.mask_token, patches)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), patches], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return {"x_norm_clstoken": x[:, 0], "x_norm_patchtokens": x[:, 1:]}


class DINOHead(nn.Module):
    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        assert nlayers == 3
        widths = (in_dim, hidden_dim, hidden_dim, bottleneck_dim)
        self.mlp = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


def balanced(scores: Tensor, temperature: float, samples: Tensor | int) -> Tensor:
    q = torch.exp(scores / temperature)
    for _ in range(3):
        q = q / q.sum(dim=0) / q.shape[1]
        q = q / q.sum(dim=1, keepdim=True) / samples
    return q * samples


class DINOLoss(nn.Module):
    def __init__(self, out_dim: int) -> None:
        super().__init__()
        self.out_dim = out_dim

    def sinkhorn_knopp_teacher(self, teacher_output: Tensor, teacher_temp: float) -> Tensor:
        return balanced(teacher_output, teacher_temp, len(teacher_output))

    def forward(
        self, student_output_list: Sequence[Tensor], teacher_out_softmaxed_centered_list: Sequence[Tensor]
    ) -> Tensor:
        terms = []
        for s in student_output_list:
            for t in teacher_out_softmaxed_centered_list:
                assert s.shape == t.shape == (len(s), self.out_dim)
                torch.testing.assert_close(t.sum(dim=1), torch.ones(len(t)))
                terms.append(-(t * F.log_softmax(s / 0.1, dim=1)).sum(dim=1).mean())
        return torch.stack(terms).sum()


class iBOTPatchLoss(nn.Module):
    def __init__(self, patch_out_dim: int) -> None:
        super().__init__()
        self.out_dim = patch_out_dim

    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_masked_patches_tensor: Tensor
    ) -> Tensor:
        sys.modules["dinov2.loss.ibot_patch_loss"].dist.all_reduce(
            n_masked_patches_tensor
        )  # also where there is one process
        assert n_masked_patches_tensor.item() == len(teacher_output)
        return balanced(teacher_output, teacher_temp, n_masked_patches_tensor)

    def forward_masked(
        self, student: Tensor, teacher: Tensor, student_masks_flat: Tensor, n_masked_patches: int, masks_weight: Tensor
    ) -> Tensor:
        assert student.shape == teacher.shape == (n_masked_patches, self.out_dim)
        assert masks_weight.sum() == pytest.approx(student_masks_flat.any(dim=1).sum().item())
        losses = -(teacher * F.log_softmax(student / 0.1, dim=1)).sum(dim=1)
        return (losses * masks_weight).sum() / len(student_masks_flat)


class KoLeoLoss(nn.Module):
    def forward(self, student_output: Tensor) -> Tensor:
        x = F.normalize(student_output, dim=1)
        return -(torch.cdist(x, x) + 2 * torch.eye(len(x))).min(dim=1).values.add(1e-8).log().mean()


class DataAugmentationDINO:
    def __init__(
        self,
        global_crops_scale: tuple[float, float],
        local_crops_scale: tuple[float, float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
    ) -> None:
        self.scales = [global_crops_scale] * 2 + [local_crops_scale] * local_crops_number
        self.sizes = [global_crops_size] * 2 + [local_crops_size] * local_crops_number

    def __call__(self, image: Image) -> dict[str, Any]:
        views = [
            to_tensor(RandomResizedCrop(size, scale)(image))
            for size, scale in zip(self.sizes, self.scales, strict=True)
        ]
        return {"global_crops": views[:2], "local_crops": views[2:], "offsets": ()}


class MaskingGenerator:
    def __init__(self, input_size: tuple[int, int], max_num_patches: float) -> None:
        self.shape = input_size

    def __call__(self, num_masking_patches: int = 0) -> np.ndarray:
        return (np.arange(self.shape[0] * self.shape[1]) < num_masking_patches).reshape(self.shape)


def collate_data_and_cast(
    samples_list: Sequence[tuple[dict[str, Any], Any]],
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    dtype: torch.dtype,
    n_tokens: int,
    mask_generator: MaskingGenerator,
) -> dict[str, Any]:
    def views(name: str) -> Tensor:  # all first views, then all second ones
        return torch.cat([torch.stack(view) for view in zip(*(s[0][name] for s in samples_list), strict=True)])

    large = views("global_crops")
    hidden = int(len(large) * mask_probability)
    counts = [int(n_tokens * mask_ratio_tuple[1])] * hidden + [0] * (len(large) - hidden)
    masks = torch.stack([torch.from_numpy(mask_generator(count)) for count in counts]).flatten(1)
    return {
        "collated_global_crops": large.to(dtype),
        "collated_local_crops": views("local_crops").to(dtype),
        "collated_masks": masks,
        "mask_indices_list": masks.flatten().nonzero().flatten(),
        "masks_weight": (1 / masks.sum(-1).clamp(min=1.0))[:, None].expand_as(masks)[masks],
        "upperbound": sum(counts),
    }


def install(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """`import dinov2` finds this from now on; the networks that are made of it."""
    made.clear()
    modules = {name: ModuleType(f"dinov2{name}") for name in (*NAMES, ".models.vision_transformer")}
    here = SimpleNamespace(**globals())
    contents = {
        ".data": ("DataAugmentationDINO", "MaskingGenerator", "collate_data_and_cast"),
        ".layers": ("DINOHead", "MemEffAttention", "NestedTensorBlock"),
        ".layers.attention": ("Attention",),
        ".loss": ("DINOLoss", "KoLeoLoss", "iBOTPatchLoss"),
        ".loss.ibot_patch_loss": ("iBOTPatchLoss",),
        ".models.vision_transformer": ("DinoVisionTransformer",),
    }
    for name, names in contents.items():
        vars(modules[name]).update({one: getattr(here, one) for one in names})
    vars(modules[".layers.block"])["XFORMERS_AVAILABLE"] = False
    vars(modules[".loss.ibot_patch_loss"])["dist"] = torch.distributed
    vars(modules[".loss"])["ibot_patch_loss"] = modules[".loss.ibot_patch_loss"]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"dinov2{name}", module)
    return made
