"""Pictures of what a backbone looks at: attention, patch features and similarity as colours. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray


def cls_attention(model: nn.Module, count: int, forward: Callable[[], Any]) -> Array | None:
    """What the class token of a timm transformer attends to in the last block, mean over heads: [count, side, side].

    forward: runs the model on `count` square images, in one batch or several. Without a class token: the mean over all
    tokens of what they attend to. None for an architecture without global attention over a square grid of patches, such
    as a convolution. timm's attention passes its weights through `attn_drop`, whatever norm or rotary embedding came
    before, so that is where they are caught.
    """
    layers = [m for m in model.modules() if hasattr(m, "attn_drop") and hasattr(m, "fused_attn")]
    if not layers:
        return None
    attention: Any = layers[-1]
    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    has_cls = getattr(model, "cls_token", None) is not None
    caught: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        weights = inputs[0].detach().float()  # [N, heads, T, T], rows sum to 1
        query = weights[:, :, 0] if has_cls else weights.mean(-2)
        caught.append(query.mean(1)[:, prefix:].cpu())

    fused, attention.fused_attn = attention.fused_attn, False
    hook = attention.attn_drop.register_forward_hook(keep)
    try:
        forward()
    finally:
        hook.remove()
        attention.fused_attn = fused
    if not caught:
        return None
    found = torch.cat(caught)  # [N, P]
    side = round(found.shape[1] ** 0.5)
    whole = side * side == found.shape[1] and len(found) == count  # attention inside windows is neither
    return found.reshape(-1, side, side).numpy() if whole else None


def patch_similarity(patches: Tensor, reference: Tensor) -> Array:
    """Cosine of every patch to one vector: patches [N, P, D], P a square; reference [D] -> [N, side, side].

    Both are taken relative to the mean of all patches given: they share a large common part that says nothing.
    """
    middle = patches.mean((0, 1))
    cosine = torch.nn.functional.cosine_similarity(patches - middle, (reference - middle).expand_as(patches), dim=-1)
    side = round(patches.shape[1] ** 0.5)
    return cosine.reshape(-1, side, side).numpy()


def patch_colours(patches: Tensor) -> Array:
    """The three main directions of the patch features of all images together as red, green, blue.

    patches: [N, P, D], P a square -> uint8 [N, side, side, 3]. Alike colours are alike features, in every image.
    """
    count, positions, dim = patches.shape
    flat = patches.reshape(-1, dim).double()
    flat = flat - flat.mean(0)
    _, _, axes = torch.linalg.svd(flat, full_matrices=False)
    axes = axes[:3]
    heaviest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    parts = flat @ (axes * heaviest.sign()).T  # a fixed sign, or the colours would flip from run to run
    parts = torch.nn.functional.pad(parts, (0, 3 - parts.shape[1]))
    low, high = (torch.quantile(parts[:: max(1, len(parts) // 100_000)], q, dim=0) for q in (0.02, 0.98))
    scaled = ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 255
    side = round(positions**0.5)
    return scaled.round().byte().reshape(count, side, side, 3).numpy()


def rgb(image: Array) -> Array:
    """uint8 [C, H, W] -> [H, W, 3]: the first three channels, or the only one three times."""
    image = image[:3] if len(image) >= 3 else image[:1].repeat(3, axis=0)
    return np.ascontiguousarray(image.transpose(1, 2, 0))


def enlarge(image: Array, size: int) -> Array:
    """[h, w, 3] -> [size, size, 3] by bilinear interpolation."""
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)


def glow(image: Array, weights: Array, ends: tuple[float, float] | None = None) -> Array:
    """Weights [h, w] as warm light on the darkened image uint8 [H, W, 3]. ends: what is black and what is brightest;
    None: the smallest and the largest weight."""
    height, width = image.shape[:2]
    low, high = ends or (float(weights.min()), float(weights.max()))
    weights = (weights - low) / max(high - low, 1e-12)
    strength = cv2.resize(weights.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    heat = cv2.applyColorMap((strength * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    return (0.4 * grey + 0.75 * heat).clip(0, 255).astype(np.uint8)


def jpeg(image: Array, quality: int = 85) -> bytes:
    """uint8 [H, W, 3] RGB -> the bytes of a JPEG file."""
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data.tobytes()
