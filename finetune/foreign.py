"""Backbones that others made: timm and transformers, each with its own normalisation and image size."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from finetune.encoder import Encoder, Pair, from_model
from hybridssl import hub, trust
from hybridssl.errors import UserError

FC_NORM = "fc_norm"  # Encoder.reading of models that norm late


def create(spec: str, name: str, size: int | None = None, **arguments: Any) -> nn.Module:
    """timm.create_model, laid out for `size` where the architecture has to know. UserError names `spec`."""
    import timm

    try:
        if size:
            try:
                return timm.create_model(name, num_classes=0, **{**arguments, "img_size": size})
            except TypeError:
                pass  # convolutions know no img_size, and take any
        return timm.create_model(name, num_classes=0, **arguments)
    except Exception as error:  # timm, its hub client and torch raise a dozen types for a name, a file or a size
        raise UserError(f"cannot load {spec}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """The kind of an error and its first line: libraries append pages of advice."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def from_timm(spec: str, fresh: bool, device: str, size: int | None) -> Encoder:
    import timm
    from huggingface_hub import try_to_load_from_cache
    from timm.data.config import resolve_data_config
    from timm.models import get_pretrained_cfg, is_model_pretrained

    name = spec.removeprefix("timm:")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(pretrained=not fresh), 3, 0.4)
        raise UserError(f"timm has no '{name}'; near: {', '.join(near) or 'none'}")
    arguments: dict[str, Any] = {}
    if not fresh:
        try:
            about = get_pretrained_cfg(name) if is_model_pretrained(name) else None
        except RuntimeError:  # the architecture is there, the tag behind the dot is not
            about = None
        if about is None:
            released = ", ".join(timm.list_models(f"{name.split('.')[0]}.*", pretrained=True)[:6]) or "none"
            raise UserError(f"timm has no released weights '{name}'; of this architecture it has: {released}")
        cached = None
        if about.hf_hub_id:
            cached = try_to_load_from_cache(about.hf_hub_id, about.hf_hub_filename or "model.safetensors")
        if isinstance(cached, str) and cached.endswith(".safetensors"):
            arguments["pretrained_cfg_overlay"] = {"file": cached}  # on this machine already: no request to the hub
        else:
            arguments["pretrained_cfg_overlay"] = trust.released(name)
            hub.require(spec)
    model = create(spec, name, size, pretrained=not fresh, **arguments)
    about = resolve_data_config({}, model=model)
    return from_model(
        model,
        forward_of(model),
        name=spec,
        dim=width(model),
        input_size=size or about["input_size"][-1],
        mean=about["mean"],
        std=about["std"],
        device=device,
        reading=FC_NORM if norms_late(model) else "",
    )


def width(model: nn.Module) -> int:
    return int(getattr(model, "head_hidden_size", None) or model.num_features)  # type: ignore[arg-type]


def forward_of(model: Any) -> Callable[[Tensor], Pair]:
    """cls is the class token after the final norm; a model without one gives what its own head would be fed."""
    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    has_cls, late = getattr(model, "cls_token", None) is not None, norms_late(model)

    def forward(images: Tensor) -> Pair:
        x = model.forward_features(images)
        x = model.fc_norm(x) if late else x
        cls = x[:, 0] if has_cls and x.ndim == 3 else model.forward_head(x, pre_logits=True)
        if x.ndim == 3:
            return cls, x[:, prefix:]
        channels_first = x.shape[1] == model.num_features
        patches = (x.flatten(2).transpose(1, 2) if channels_first else x.flatten(1, 2)) if x.ndim == 4 else None
        return cls, patches if patches is not None and patches.shape[-1] == cls.shape[-1] else None

    return forward


def norms_late(model: Any) -> bool:
    """Whether a model with a class token (BEiT, EVA-02) has its final norm behind the pooling, as `fc_norm`: what
    `forward_features` gives is then the residual stream, a few of whose numbers drown all others."""
    norms = [getattr(model, name, None) or nn.Identity() for name in ("norm", "fc_norm")]
    there = [not isinstance(norm, nn.Identity) for norm in norms]
    return getattr(model, "cls_token", None) is not None and there == [False, True]


def from_transformers(spec: str, fresh: bool, device: str, size: int | None) -> Encoder:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    name = spec.removeprefix("hf:")
    local = hub.is_here(name)
    if not local:
        hub.require(spec)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    absent: set[str] = set()
    try:
        trust.transformers_config(name, local_files_only=local)
        about = _hf_geometry(AutoImageProcessor.from_pretrained(name, **options))
        if fresh:
            model: Any = AutoModel.from_config(AutoConfig.from_pretrained(name, **options), dtype=torch.float32)
        else:  # float32, because a file in half precision would otherwise run so, and slowly on a CPU
            model, loaded = AutoModel.from_pretrained(
                name, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
            )
            absent = set(loaded["missing_keys"])
    except UserError:
        raise
    except Exception as error:  # configuration, file, network and import errors of transformers
        raise UserError(f"cannot load {spec}: {reason_of(error)}") from error
    model, absent = image_half(model, absent)
    if absent:
        raise UserError(
            f"{spec} lacks {len(absent)} of the {len(model.state_dict())} tensors of a {type(model).__name__}, which "
            f"would stay random (first: {min(absent)}): is its config.json that of these weights?"
        )
    forward = _hf_forward(model, interpolate=size is not None)
    about |= {"input_size": size} if size else {}
    blank = torch.zeros(1, 3, about["input_size"], about["input_size"])
    try:
        with torch.inference_mode():
            dim = forward(blank)[0].shape[-1]
    except (ValueError, RuntimeError) as error:  # SAM, say, has position embeddings of one size
        raise UserError(f"{spec} does not run at {about['input_size']} px: {reason_of(error)}") from error
    reading = FC_NORM if late_norm(model) else ""
    return from_model(model, forward, name=spec, dim=dim, device=device, reading=reading, **about)


def late_norm(model: Any) -> nn.Module | None:
    """The final norm of a transformers model that has it behind the pooling (see `norms_late`), if it has."""
    inner = getattr(model, "timm_model", None)
    if inner is not None:
        return inner.fc_norm if norms_late(inner) else None
    norm = getattr(getattr(model, "pooler", None), "layernorm", None)  # of BEiT
    return norm if isinstance(getattr(model, "layernorm", None), nn.Identity) else None


def image_half(model: Any, absent: set[str]) -> tuple[Any, set[str]]:
    """The image tower of CLIP, SigLIP, BLIP and SAM, or the model itself; and which of `absent` belong to it.

    The pooler of a plain ViT does not count: it is often not released, and not used here.
    """
    for tower in ("vision_model", "vision_encoder"):
        if hasattr(model, tower):
            model = getattr(model, tower)
            absent = {k.removeprefix(f"{tower}.") for k in absent if k.startswith(f"{tower}.")}
    return model, {k for k in absent if not k.startswith("pooler.")}


def _hf_geometry(processor: Any) -> dict[str, Any]:
    """Input size, mean and std of a transformers image processor."""
    config = getattr(processor, "data_config", None)  # TimmWrapper keeps timm's own words
    if config:
        return {"input_size": config["input_size"][-1], "mean": config["mean"], "std": config["std"]}
    asked = (getattr(processor, "do_center_crop", False) and processor.crop_size) or processor.size
    sides = [asked] if isinstance(asked, int) else [v for v in dict(asked).values() if v]
    mean, std = processor.image_mean, processor.image_std
    if not getattr(processor, "do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return {"input_size": int(min(sides)), "mean": mean, "std": std}


def _hf_forward(model: Any, interpolate: bool) -> Callable[[Tensor], Pair]:
    """(cls, patches) of a transformers image model. cls is the class token, or the trained pooling of those without."""
    parameters = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = (
        {"interpolate_pos_encoding": True} if interpolate and "interpolate_pos_encoding" in parameters else {}
    )
    towered = type(model).__name__.endswith(("VisionModel", "VisionTransformer", "VisionEncoder"))
    masked = hasattr(model.config, "mask_ratio") and "noise" in parameters  # MAE hides and shuffles patches, always
    if masked:
        model.config.mask_ratio = 0.0
    late = late_norm(model)

    def forward(images: Tensor) -> Pair:
        patch = getattr(model.config, "patch_size", None)
        count = (images.shape[-2] // patch) * (images.shape[-1] // patch) if isinstance(patch, int) else None
        order = {}
        if masked and count:
            order = {"noise": torch.arange(count, device=images.device).expand(len(images), -1)}
        out = model(pixel_values=images, **extra, **order)
        x, pooled = out.last_hidden_state, getattr(out, "pooler_output", None)
        if x.ndim == 4:  # [N, D, H, W]: convolutions, and SAM, whose neck has no pooling
            patches = x.flatten(2).transpose(1, 2)
            return (patches.mean(1) if pooled is None else pooled.flatten(1)), patches
        if count is None:  # DINOv3's ConvNeXt puts the pooled map before the map
            count = x.shape[1] - 1
        if late is not None:
            x = late(x)
        if count >= x.shape[1]:  # no class token; Swin and FocalNet have merged patches on the way
            return (x.mean(1) if pooled is None else pooled), x
        # The pooler of plain ViTs is often untrained; that of a CLIP-like tower is its trained output.
        return (pooled if towered and pooled is not None else x[:, 0]), x[:, x.shape[1] - count :]

    return forward
