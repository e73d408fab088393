"""One way to ask any backbone for features: our runs and exports, timm, transformers, and two null baselines.

`load(spec)` takes a run folder, an exported folder, `timm:NAME`, `hf:ID`, `random:SPEC` or `histogram` and returns an
Encoder, which brings its own normalisation and image size.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from finetune import foreign
from finetune.encoder import Encoder, Pair, from_model, histogram
from hybridssl import run, trust
from hybridssl.backbone import BackboneOptions, build
from hybridssl.errors import UserError
from hybridssl.recipe import resolve

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(spec: str, seed: int = 0, device: str = "cpu", size: int | None = None) -> Encoder:
    """The encoder that `spec` names, at its own image size or at `size`. UserError when it cannot be had.

    seed: of the weights of `random:SPEC`, which has the architecture, size and normalisation of SPEC.
    """
    fresh = spec.startswith("random:")
    name = spec.removeprefix("random:")
    with torch.random.fork_rng():  # fresh weights come from `seed`, and nobody else's random numbers move
        torch.manual_seed(seed)
        encoder = _load(name, fresh, device, size)
    return replace(encoder, name=spec, baseline=fresh or encoder.baseline, digests=None if fresh else encoder.digests)


def _load(name: str, fresh: bool, device: str, size: int | None) -> Encoder:
    if name == "histogram" and not fresh:
        if size:
            raise UserError(f"--size {size} changes nothing for the histogram, which has one size: leave --size out")
        return histogram(device)
    if name.startswith("hf:"):
        return foreign.from_transformers(name, fresh, device, size)
    if name.startswith("timm:"):
        return foreign.from_timm(name, fresh, device, size)
    folder = Path(name)
    if (folder / "config.json").is_file():
        return _export(folder, fresh, device, size)
    if (folder / "state.json").is_file() or (folder / "checkpoints").is_dir():
        return _run(folder, fresh, device, size)
    if fresh and not folder.exists() and "/" not in name:
        return foreign.from_timm(f"timm:{name}", fresh, device, size)
    raise UserError(_unknown(name))


def _unknown(name: str) -> str:
    import timm

    folder = Path(name)
    if folder.exists():
        return (
            f"{name} is neither a run folder (checkpoints/) nor an exported one (config.json): "
            "is it still before its first checkpoint, or a folder above?"
        )
    siblings = [str(p) for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(name, siblings, 2, 0.6)
    near += [f"timm:{n}" for n in difflib.get_close_matches(name, timm.list_models(), 3, 0.6)]
    hint = f"; near: {', '.join(near)}" if near else ""
    forms = "a run folder, an exported folder, timm:NAME, hf:ID, random:SPEC or histogram"
    return f"no backbone '{name}'{hint}. A backbone is {forms}"


def _digests(*folders: Path) -> np.ndarray | None:
    for folder in folders:
        path = folder / "pretraining.safetensors"
        if path.is_file():
            try:
                return np.unique(load_file(path)["digest"])
            except (OSError, KeyError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error}): export the backbone again") from error
    return None


def _run(folder: Path, fresh: bool, device: str, size: int | None) -> Encoder:
    backbone, state = run.load_backbone(folder)
    about = state["backbone"]
    if fresh:
        backbone = build(resolve(BackboneOptions, [about["options"]]), about["channels"], about["image_size"])
    patch = backbone.patch_size

    def forward(images: Tensor) -> Pair:
        tokens = backbone.to(device).eval()(images)
        return tokens.cls, tokens.patches

    size = int(size or about["image_size"])
    if size % patch:
        raise UserError(f"--size {size} is not a multiple of the patch size {patch} of {folder}")
    checkpoint = run.latest(folder)
    return from_model(
        backbone.model,  # the same tensors under the same names as in the exported folder: the same sha256
        forward,
        name=str(folder),
        dim=backbone.dim,
        input_size=size,
        mean=about["mean"],
        std=about["std"],
        channels=about["channels"],
        digests=_digests(folder, checkpoint, *run.homes(checkpoint)),
        device=device,
    )


def _export(folder: Path, fresh: bool, device: str, size: int | None) -> Encoder:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no mapping")
        about = config.get("pretrained_cfg") or {}
        if "architecture" not in config:
            raise UserError(
                f"{folder}/config.json names no timm architecture; if transformers made it, use hf:{folder}"
            )
        architecture, arguments = trust.config(config, f"{folder}/config.json")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}/config.json cannot be read ({error}): export the backbone again") from error
    if fresh:
        model = foreign.create(str(folder), architecture, size, pretrained=False, **arguments)
    else:
        trust.folder(folder)
        model = foreign.create(str(folder), f"local-dir:{folder}", size, pretrained=True)
    own_size = about.get("input_size", (3, 224, 224))
    return from_model(
        model,
        foreign.forward_of(model),
        name=str(folder),
        dim=foreign.width(model),
        input_size=size or own_size[-1],
        mean=about.get("mean", IMAGENET_MEAN),
        std=about.get("std", IMAGENET_STD),
        channels=own_size[0],
        digests=_digests(folder),
        device=device,
        reading=foreign.FC_NORM if foreign.norms_late(model) else "",
    )
