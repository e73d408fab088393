"""Patch features as maps: those of the last block, those of several blocks, and a colour baseline without weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.backbones import load
from finetune.encoder import Encoder, Pair
from hybridssl.errors import UserError
from hybridssl.views import normalise

Maps = Callable[[Tensor], list[Tensor]]  # uint8 [N, C, S, S] -> float32 [N, D, h, w], one a level, coarsest last
BLOCKS = 4
COLOUR_SIZE, COLOUR_PATCH = 224, 8  # pixels


def load_encoder(spec: str, seed: int = 0, device: str = "cpu", size: int | None = None) -> Encoder:
    """`backbones.load`, except that `histogram` describes every patch in place of the whole image."""
    return colours(device, size or COLOUR_SIZE) if spec == "histogram" else load(spec, seed, device, size)


def last_map(encoder: Encoder) -> Maps:
    """The patch tokens after the final norm as one map. UserError when there are none, or no square of them."""

    def maps(images: Tensor) -> list[Tensor]:
        return [_square(encoder.patches(images), encoder)]

    return maps


def block_maps(encoder: Encoder, count: int = BLOCKS) -> Maps | None:
    """Maps of `count` evenly spaced blocks (of 12: 3, 6, 9, 12), or of the last stages of a network that has stages.

    Tokens of a block are brought to mean 0 and deviation 1 each, since the residual stream grows with depth and a few
    of its tokens are a hundred times as large as the others. None when the backbone does not let one look inside.
    """
    model: Any = encoder.model
    model = getattr(model, "timm_model", model)  # transformers' wrapper of timm models
    if hasattr(model, "forward_intermediates"):
        return _timm_maps(encoder, model, count)
    blocks = _longest_list(model) if model is not None else None
    return None if blocks is None else _hooked_maps(encoder, blocks, count)


def spaced(depth: int, count: int) -> list[int]:
    """Evenly spaced blocks, the last among them; all of them where there are fewer than `count`."""
    return sorted({max(0, round((i + 1) * depth / count) - 1) for i in range(count)})


def _timm_maps(encoder: Encoder, model: Any, count: int) -> Maps:
    info = list(model.feature_info)
    staged = len({stage["reduction"] for stage in info}) > 1
    chosen = list(range(len(info)))[-count:] if staged else spaced(len(info), count)

    @torch.inference_mode()
    def maps(images: Tensor) -> list[Tensor]:
        x = normalise(images.to(encoder.device), encoder.mean, encoder.std)
        found = model.forward_intermediates(x, indices=chosen, intermediates_only=True)
        if not staged:
            found = [_standard(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for x in found]
        return [x.float().cpu() for x in found]

    return maps


def _longest_list(model: nn.Module) -> nn.ModuleList | None:
    """The blocks of a plain transformer of the `transformers` library: its longest list of modules of one type."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(part) for part in m}) == 1]
    longest = max(lists, key=len, default=None)
    return None if longest is None or len(longest) < 2 else longest


def _hooked_maps(encoder: Encoder, blocks: nn.ModuleList, count: int) -> Maps | None:
    chosen = spaced(len(blocks), count)

    @torch.inference_mode()
    def maps(images: Tensor) -> list[Tensor]:
        caught: list[Tensor] = []

        def catch(module: nn.Module, inputs: Any, output: Any) -> None:
            caught.append(output if isinstance(output, Tensor) else output[0])

        hooks = [blocks[k].register_forward_hook(catch) for k in chosen]
        try:
            patches = encoder.tokens(images.to(encoder.device))[1]
        finally:
            for hook in hooks:
                hook.remove()
        assert patches is not None
        # Patches come last, after class and register tokens; SAM keeps its blocks as [N, h, w, D].
        tokens = [x.flatten(1, -2)[:, -patches.shape[1] :] for x in caught]
        return [_square(_standard(x).float().cpu(), encoder) for x in tokens]

    blank = torch.zeros(1, encoder.channels, encoder.input_size, encoder.input_size, dtype=torch.uint8)
    try:  # a network with stages has lists of blocks too, but none that runs through at one resolution
        return maps if len(maps(blank)) == len(chosen) else None
    except (AssertionError, UserError, RuntimeError, IndexError, TypeError, AttributeError):
        return None


def _standard(x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:])


def _square(tokens: Tensor, encoder: Encoder) -> Tensor:
    """[N, P, D] row by row -> [N, D, h, h]."""
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise UserError(f"{encoder.name} gives {tokens.shape[1]} patches, which are no square grid: it cannot segment")
    return tokens.transpose(1, 2).unflatten(2, (side, side)).contiguous()


def colours(device: str, size: int) -> Encoder:
    """The null baseline: of every 8 x 8 patch, mean and deviation of each channel in it and in 3 x 3 patches around it,
    and the square root of its joint RGB histogram (4 bins a channel). 76 values that no training has shaped."""
    if size % COLOUR_PATCH:
        raise UserError(f"--size {size} is not a multiple of {COLOUR_PATCH}, the patch of the histogram baseline")

    def moments(x: Tensor, patch: int, stride: int, pad: int) -> list[Tensor]:
        mean, square = (F.avg_pool2d(v, patch, stride, pad, count_include_pad=False) for v in (x, x * x))
        return [mean, (square - mean * mean).clamp(min=0).sqrt()]

    def tokens(images: Tensor) -> Pair:
        x = images.float() / 255
        bins = (images >> 6).float()
        joint = (bins[:, :1] * 4 + bins[:, 1:2]) * 4 + bins[:, 2:]  # [N, 1, S, S], 0..63
        pixels = F.unfold(joint, COLOUR_PATCH, stride=COLOUR_PATCH).long()  # [N, 64, P]
        counts = torch.zeros_like(pixels, dtype=torch.float32).scatter_add_(1, pixels, torch.ones_like(pixels).float())
        inside = moments(x, COLOUR_PATCH, COLOUR_PATCH, 0)
        around = moments(x, 3 * COLOUR_PATCH, COLOUR_PATCH, COLOUR_PATCH)
        shape = [x.flatten(2) for x in (*inside, *around)]  # [N, 3, P] each
        patches = torch.cat([*shape, (counts / COLOUR_PATCH**2).sqrt()], 1).transpose(1, 2)  # [N, P, 76]
        return patches.mean(1), patches

    digest = hashlib.sha256(b"8 px patches: RGB moments in it and in 3x3, sqrt joint histogram 4x4x4, v1").hexdigest()
    return Encoder("histogram", digest, 76, size, (0, 0, 0), (1, 1, 1), tokens, baseline=True, device=device)
