"""Crops of several sizes in one pass over the weights of a timm vision transformer.

Linear layers and norms treat every token alike, so the tokens of all crops run through them as one long list; only
attention has to know which belong together. timm's own blocks take over where there is one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybridssl.attention import Layout, attend
from hybridssl.depth import Draw, draw, rate, residual

Embedded = tuple[Tensor, Tensor | None]  # tokens [N, L, D] before the first block, and rotary positions (EVA)


class PackedBlock(Block):
    """timm's Block, which also takes tokens [T, D] of samples that lie one behind the other, with the `draws` of its
    two branches, which say how they lie."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        draws: tuple[Draw, Draw] | None = None,
    ) -> Tensor:
        if draws is None:
            return super().forward(x, attn_mask, is_causal)
        first, second = draws
        x = residual(x, first, lambda t: self.ls1(_attention(self.attn, self.norm1(t), first.layout)))  # type: ignore[arg-type]
        return residual(x, second, lambda t: self.ls2(self.mlp(self.norm2(t))))


class PackedEvaBlock(EvaBlock):
    """timm's EvaBlock (EVA, DINOv3), likewise. Its attention, of several kinds, runs once a size."""

    def forward(
        self,
        x: Tensor,
        rope: Any = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        draws: tuple[Draw, Draw] | None = None,
    ) -> Tensor:
        """rope: rotary positions; with `draws` a list of them, one a size."""
        if draws is None:
            return super().forward(x, rope, attn_mask, is_causal)

        def attention(t: Tensor) -> Tensor:
            parts = zip(split(self.norm1(t), draws[0].layout), _chosen(rope, draws[0]), strict=True)
            out = torch.cat([self.attn(part, rope=places).flatten(0, 1) for part, places in parts])
            return out if self.gamma_1 is None else self.gamma_1 * out

        def mlp(t: Tensor) -> Tensor:
            out = self.mlp(self.norm2(t))
            return out if self.gamma_2 is None else self.gamma_2 * out

        return residual(residual(x, draws[0], attention), draws[1], mlp)


def adopt(model: nn.Module) -> bool:
    """Let the blocks of `model` take packed tokens, weights and names as they are; False: its architecture cannot."""
    blocks = list(getattr(model, "blocks", ()))
    if isinstance(model, VisionTransformer) and type(model).forward_features is VisionTransformer.forward_features:
        able, packed = all(type(b) is Block and type(b.attn) is Attention for b in blocks), PackedBlock
    else:
        able, packed = type(model) is Eva and all(type(b) is EvaBlock for b in blocks), PackedEvaBlock
    for block in blocks if able else ():
        block.__class__ = packed
    return able


def embed(model: Any, images: Tensor) -> Embedded:
    """Images [N, C, H, W] of one size -> what timm's `forward_features` would hand to the first block."""
    x = model.patch_embed(images)
    if isinstance(model, Eva):
        x, rope = model._pos_embed(x)
        return model.norm_pre(x), rope
    return model.norm_pre(model.patch_drop(model._pos_embed(x))), None


def run(model: Any, groups: Sequence[Embedded]) -> list[Tensor]:
    """Blocks and final norm over all groups at once: [N, L, D] of each -> the same."""
    layout: Layout = tuple((x.shape[0], x.shape[1]) for x, _ in groups)
    x = torch.cat([x.flatten(0, 1) for x, _ in groups])
    recompute = model.grad_checkpointing and torch.is_grad_enabled()
    for i, block in enumerate(model.blocks):
        # Drawn out here: so a block that runs twice (checkpointing) draws once, and a compiled one draws nothing.
        given: dict[str, Any] = {
            "draws": tuple(draw(layout, rate(drop), x) for drop in (block.drop_path1, block.drop_path2))
        }
        if isinstance(model, Eva):  # "mixed" positions differ from block to block
            given["rope"] = [p[i] if model.rope_mixed and p is not None else p for _, p in groups]
        x = checkpoint(block, x, use_reentrant=False, **given) if recompute else block(x, **given)
    return split(model.norm(x), layout)


def drops(model: Any) -> bool:
    """Whether a pass of `model` at this moment leaves out branches of some samples."""
    return any(rate(drop) for block in model.blocks for drop in (block.drop_path1, block.drop_path2))


def split(x: Tensor, layout: Layout) -> list[Tensor]:
    """[T, D] -> [N, L, D] of every group."""
    parts = x.split([samples * length for samples, length in layout])
    return [part.unflatten(0, shape) for part, shape in zip(parts, layout, strict=True)]


def _attention(attn: Attention, x: Tensor, layout: Layout) -> Tensor:
    """timm's Attention over packed tokens [T, D]."""
    q, k, v = attn.qkv(x).unflatten(1, (3, attn.num_heads, attn.head_dim)).unbind(1)  # [T, H, d]
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = attn.norm(attend(attn.q_norm(q), attn.k_norm(k), v, layout, attn.fused_attn, dropout).flatten(1))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def _chosen(ropes: Sequence[Tensor | None], drawn: Draw) -> list[Tensor | None]:
    """Rotary positions of the samples drawn: of some architectures each sample has its own, [N, 1 or H, P, d]."""
    if not drawn.samples:
        return list(ropes)
    pairs = zip(ropes, drawn.samples, strict=True)
    return [rope[samples] if rope is not None and rope.ndim == 4 else rope for rope, samples in pairs]
