"""AdamW over parameter groups: layer decay, a slower patch embedding, no decay for norms, biases, scales and tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from hybridssl import sharding
from hybridssl.schedule import cosine, warmup_cosine


@dataclass(frozen=True)
class OptimOptions:
    lr: float = 1e-3  # for a batch of 1,024 images; scaled by sqrt(batch / 1024) (DINOv2)
    final_lr: float = 1e-6  # at the end of the cosine, not scaled
    warmup: float = 0.1  # share of the run with a rising learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    weight_decay: tuple[float, float] = (0.04, 0.4)  # cosine from first to second
    layer_decay: float = 1.0  # learning rate x this per block, from the last to the first
    patch_embed_lr: float = 0.2  # further factor of the patch embedding (MoCo v3: it is what diverges first)
    clip: float = 3.0  # largest gradient norm over all parameters; 0: no bound
    heads_first: float = 0.0  # share of the run in which the backbone rests; for continuing from released weights

    def __post_init__(self) -> None:
        if self.clip < 0:
            raise ValueError(f"clip is {self.clip}; it must be 0 (no bound) or above")


def scaled_lr(options: OptimOptions, batch: int) -> float:
    """The peak learning rate for an effective batch of `batch` images."""
    return options.lr * math.sqrt(batch / 1024)


def build(backbone: nn.Module, heads: nn.Module, options: OptimOptions) -> torch.optim.AdamW:
    """AdamW whose groups carry `scale` (of the learning rate) and `decays` (takes weight decay or not).

    A module among the heads that has come trained (a text encoder) names its own scale as `lr_scale`. All parameters
    that are treated alike share a group, so that one kernel updates them.
    """
    model: nn.Module = backbone.model  # type: ignore[assignment]
    chosen: dict[nn.Parameter, tuple[float, bool]] = {}
    patch = {id(p) for p in getattr(model, "patch_embed", nn.Identity()).parameters()}  # learns at a rate of its own
    for p, scale, decays in _layers(model, options.layer_decay):
        chosen[p] = (scale * options.patch_embed_lr if id(p) in patch else scale, decays)
    if backbone.mask_token is not None:
        chosen[backbone.mask_token] = (1.0, False)  # type: ignore[index]
    for part in heads.modules():
        for p in part.parameters(recurse=False):
            if p.requires_grad:
                chosen[p] = (getattr(part, "lr_scale", 1.0), p.ndim > 1)

    alike: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for p, treatment in chosen.items():
        alike.setdefault(treatment, []).append(p)
    groups = [{"params": ps, "scale": scale, "decays": decays} for (scale, decays), ps in alike.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=options.betas, weight_decay=0.0, fused=True)


def _layers(model: nn.Module, layer_decay: float) -> list[tuple[nn.Parameter, float, bool]]:
    """What moves of a network of timm: parameter, factor of the learning rate (1: the last layer), takes weight decay.

    timm knows the layers, but takes learnt rotary positions, which belong to the first, for one behind the last.
    """
    free = {"cls_token", "reg_token", "pos_embed", *getattr(model, "no_weight_decay", set)()}  # type: ignore[operator]
    groups = param_groups_layer_decay(model, 1.0, no_weight_decay_list=free, layer_decay=layer_decay)
    rotary = {id(p) for name, p in model.named_parameters() if name.startswith("rope.")}
    others = [group["lr_scale"] for group in groups if not rotary.issuperset(map(id, group["params"]))]
    first, last = (min(others), max(others)) if rotary else (1.0, 1.0)
    return [
        (p, (first if id(p) in rotary else group["lr_scale"]) / last, group["weight_decay"] > 0)
        for group in groups
        for p in group["params"]
    ]


def set_hyperparameters(
    optimizer: torch.optim.Optimizer, options: OptimOptions, batch: int, progress: float
) -> dict[str, float]:
    """Write learning rate and weight decay of this moment into the groups; returns them for the log."""
    lr = warmup_cosine(scaled_lr(options, batch), options.final_lr, options.warmup, progress)
    decay = cosine(*options.weight_decay, progress)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
        group["weight_decay"] = decay if group["decays"] else 0.0
    return {"lr": lr, "weight_decay": decay}


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The optimiser's tensors by parameter name (`NAME|exp_avg`), so that a checkpoint outlives a regrouping."""
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{name}|{key}", value


def load_named_state(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `named_state`; a parameter that never had a gradient has no entry, then as now: moments that it
    has come by since (a run that goes back) are forgotten."""
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        own = {key.split("|", 1)[1]: t for key, t in tensors.items() if key.split("|", 1)[0] == name}
        if own:
            # Moments are of the parameter's kind; the fused AdamW's step counter is float32, on the same device.
            optimizer.state[parameter] = {
                key: t.to(parameter.device) if key == "step" else sharding.like(parameter, t) for key, t in own.items()
            }
