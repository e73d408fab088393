"""Attention of samples of several lengths that lie one behind the other: each sample attends to itself alone."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# (samples, tokens of each) of every group of equally long samples, in the order in which they lie: T tokens in all.
Layout = tuple[tuple[int, int], ...]


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, fused: bool, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sample. q, k, v: [T, H, d] -> [T, H, d].

    fused: by a kernel that keeps no attention matrix, which on CUDA is one call for all lengths where xformers has one
    (see `usable`), and one call a length where it has not. Else by plain products.
    dropout: share of the attention weights that are dropped.
    """
    if fused and q.is_cuda and usable(_kind(q), q.shape[-1], q.device):
        return _block_diagonal(q, k, v, layout, dropout)
    sizes = [samples * length for samples, length in layout]
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), layout, strict=True)
    return torch.cat([_one_length(a, b, c, shape, fused, dropout) for a, b, c, shape in parts])


def _one_length(q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, int], fused: bool, dropout: float) -> Tensor:
    q, k, v = (t.unflatten(0, shape).transpose(1, 2) for t in (q, k, v))  # [N, H, L, d]
    if fused:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    else:
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        out = F.dropout(weights, dropout) @ v
    return out.transpose(1, 2).flatten(0, 1)


def _block_diagonal(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout: float) -> Tensor:
    q, k, v = (t.to(_kind(q)) for t in (q, k, v))
    mask = _mask(layout, q.device)
    return _xformers().memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, p=dropout)[0]


def _kind(q: Tensor) -> torch.dtype:
    """In which it is computed: autocast knows nothing of xformers' kernels, and norms of q and k give float32."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype


@functools.cache
def usable(dtype: torch.dtype, width: int, device: torch.device) -> bool:
    """Whether xformers is installed and has a kernel of those for training for heads of `width` in this type here.

    Its import says nothing of that: one that was built for another CUDA than torch only warns then, and refuses every
    call later, as it does what the device is too old or too new for. So a small one is tried.
    """
    if _xformers() is None:
        return False
    # Whoever asks first may be the teacher, without gradients, or a block that is computed twice: the checkpoint around
    # it counts what is saved, and the second time nothing would be.
    unseen = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.inference_mode(False), torch.enable_grad(), unseen:
        few = torch.zeros(1, 8, 1, width, dtype=dtype, device=device, requires_grad=True)
        try:
            _xformers().memory_efficient_attention(few, few, few, attn_bias=_mask(((2, 4),), device))
        except NotImplementedError:
            return False
    return True


@functools.lru_cache(maxsize=256)  # the blocks of a pass ask for the same few
def _mask(layout: Layout, device: torch.device) -> Any:
    lengths = [length for samples, length in layout for _ in range(samples)]
    return _xformers().fmha.BlockDiagonalMask.from_seqlens(lengths, device=device)


@functools.cache
def _xformers() -> Any:
    """xformers.ops, or None where it is not installed."""
    try:
        return importlib.import_module("xformers.ops")
    except ImportError:
        return None
