"""Backbones from a recipe: any transformer or convolutional network of timm, and loading that is never silent."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from hybridssl import cnn, trust
from hybridssl.errors import UserError
from hybridssl.vit import UNEQUAL, Backbone, BackboneOptions, Crops

__all__ = ["UNEQUAL", "Backbone", "BackboneOptions", "Coverage", "Crops", "build", "load_weights"]


@dataclass(frozen=True)
class Coverage:
    """How much of a backbone a set of weights filled."""

    matched: int
    total: int
    missing: tuple[str, ...]  # the backbone's tensors that keep their fresh values
    unexpected: tuple[str, ...]  # tensors of the file that fit nowhere

    def __str__(self) -> str:
        text = f"{self.matched} of {self.total} backbone tensors loaded"
        for kind, names in (("fresh", self.missing), ("unused", self.unexpected)):
            if names:
                text += f"; {len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        return text


def build(options: BackboneOptions, channels: int = 3, image_size: int = 224) -> Backbone:
    """A backbone with fresh weights. Raises UserError for an unknown name (with the nearest ones) or a bad argument."""
    if options.name not in timm.list_models():
        near = difflib.get_close_matches(options.name, timm.list_models(), 3, 0.3)
        raise UserError(f"backbone.name: timm has no '{options.name}'; near: {', '.join(near)}")
    args = trust.arguments(options.args, "backbone.args")
    if cnn.is_convolutional(options.name):
        return cnn.build(options, channels, image_size)
    if options.registers is not None:
        args["reg_tokens"] = options.registers
    size = options.image_size or image_size
    try:
        model = timm.create_model(
            options.name,
            pretrained=False,
            num_classes=0,
            global_pool="token",  # keeps the final norm in forward_features, for architectures that pool by mean too
            in_chans=channels,
            img_size=size,
            dynamic_img_size=True,
            drop_path_rate=options.drop_path,
            **args,
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"timm cannot build {options.name} at {size} px with {args}: {error}") from error
    backbone = Backbone(model)
    if size % (patch := backbone.patch_size):
        key = "backbone.image_size" if options.image_size else "views.global_size"
        near = max(round(size / patch), 1) * patch
        raise UserError(f"{key}={size} is not a multiple of {options.name}'s patch of {patch} px: try {near}")
    return backbone


def load_weights(backbone: Backbone, options: BackboneOptions) -> Coverage:
    """Fill `backbone` from `options.weights`. Position embeddings are resampled to its grid.

    Raises UserError when the source cannot be read, or when less than `options.min_match` of the tensors match.
    """
    state = _read_weights(options)
    fitted = _fit(state, backbone.model)
    own = backbone.model.state_dict()
    good = {name: t for name, t in fitted.items() if name in own and own[name].shape == t.shape}
    coverage = Coverage(
        len(good), len(own), tuple(sorted(own.keys() - good.keys())), tuple(sorted(fitted.keys() - good.keys()))
    )
    if coverage.matched < options.min_match * coverage.total:
        raise UserError(
            f"{options.weights}: only {coverage}. That is below backbone.min_match={options.min_match}: "
            f"is it a {options.name}? (backbone.args must match the weights too)"
        )
    backbone.model.load_state_dict(good, strict=False)
    return coverage


def _read_weights(options: BackboneOptions) -> dict[str, Tensor]:
    source = options.weights
    path = Path(source)
    try:
        if source == "pretrained":
            return _released(options.name, trust.released(options.name))
        if path.is_dir():
            trust.folder(path)
            return load_file(path / trust.WEIGHTS)
        if path.suffix == ".safetensors":
            return load_file(path)
        if options.pickled and path.is_file():
            return trust.pickled(path)
        if path.exists() or source.count("/") != 1:
            raise UserError(
                f"backbone.weights={source}: neither 'pretrained', a folder with model.safetensors, a .safetensors "
                "file nor a hub id org/name (a .pth is a pickle: read only if backbone.pickled=true says so)"
            )
        return _released(f"hf-hub:{source}", {"hf_hub_filename": trust.WEIGHTS})
    except UserError:
        raise
    except Exception as error:  # hub, network and file errors come in a dozen types of four libraries
        raise UserError(
            f"cannot load backbone.weights={source}: {type(error).__name__}: {str(error).splitlines()[0][:200]}. "
            "Give a local folder or file, or check the name and the network"
        ) from error


def _released(name: str, overlay: dict[str, str]) -> dict[str, Tensor]:
    return timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay).state_dict()


def _fit(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Foreign names (DINOv2, CLIP) to timm's, position embeddings to the model's grid, both by timm's own filter."""
    from timm.models import eva, vision_transformer

    state = {name.removeprefix("teacher.backbone.model."): tensor for name, tensor in state.items()}
    if isinstance(model, vision_transformer.VisionTransformer):
        if "pos_embed" in state and model.pos_embed is not None and not model.no_embed_class:
            state["pos_embed"] = _room_for_registers(state["pos_embed"], model.num_reg_tokens)
        state = vision_transformer.checkpoint_filter_fn(state, model)  # type: ignore[assignment]
    elif isinstance(model, eva.Eva):
        state = eva.checkpoint_filter_fn(state, model)
        # Where a released model averages patches, its final norm stands behind the mean; ours stands before.
        state = {name.replace("fc_norm.", "norm.", 1): tensor for name, tensor in state.items()}
    about: Any = model.pretrained_cfg
    classifiers = tuple(f"{name}." for name in _listed(about.get("classifier") or "head"))
    for name in _listed(about.get("first_conv") or ()):
        _fit_channels(state, f"{name}.weight", model.state_dict())
    return {name: tensor for name, tensor in state.items() if not name.startswith(classifiers)}


def _listed(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _fit_channels(state: dict[str, Tensor], name: str, own: dict[str, Tensor]) -> None:
    """First layers that saw colour, for images of one channel or of many: their sum, or in turn, as timm does."""
    if name in state and name in own and state[name].shape[1] == 3 != own[name].shape[1]:
        state[name] = adapt_input_conv(own[name].shape[1], state[name])


def _room_for_registers(pos_embed: Tensor, registers: int) -> Tensor:
    """Position embeddings [1, 1 + P, D] of a ViT without registers -> [1, 1 + R + P, D]; others as they are.

    Where class and register tokens share the table of positions, timm takes the first 1 + R rows for them.
    """
    rows = pos_embed.shape[1]
    if not _square(rows - 1) or _square(rows - 1 - registers):
        return pos_embed
    return torch.cat([pos_embed[:, :1], pos_embed.new_zeros(1, registers, pos_embed.shape[2]), pos_embed[:, 1:]], 1)


def _square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
