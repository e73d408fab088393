"""What a file that others made may ask for when a model is built from it: weights in safetensors, and nothing else.

timm reads pickles where a folder or a repository has no safetensors, loads whatever file `checkpoint_path` names, and
takes `hf-hub:...` for an architecture. transformers fetches kernels that a config names. None of that may come from a
file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridssl.errors import UserError

WEIGHTS = "model.safetensors"
# Arguments of timm.create_model that say where weights come from: those of `backbone.weights` and no others do.
REFUSED = ("checkpoint_path", "cache_dir")
LARGEST, DEEPEST = 1 << 16, 1 << 10  # of the numbers among them, and of those that count blocks


def arguments(given: Any, where: str) -> dict[str, Any]:
    """Further arguments of an architecture. UserError when one of them names a place that weights come from."""
    if not isinstance(given, Mapping):
        raise UserError(f"{where} is no mapping of arguments: {given!r}")
    wrong = [str(name) for name in given if str(name) in REFUSED or str(name).startswith("pretrained")]
    if wrong:
        raise UserError(f"{where} names {', '.join(wrong)}: weights come from backbone.weights alone, as safetensors")
    for name, value in given.items():
        if _largest(value) > (DEEPEST if "depth" in str(name) else LARGEST):
            raise UserError(f"{where}.{name}={str(value)[:40]} is more than any network has")
    return dict(given)


def _largest(value: Any) -> float:
    if isinstance(value, list | tuple):
        return max(map(_largest, value), default=0)
    return abs(value) if isinstance(value, int | float) else 0


def config(about: Any, where: str) -> tuple[str, dict[str, Any]]:
    """(architecture, arguments) of a config.json in timm's layout. UserError when it asks for more than that."""
    import timm

    if not isinstance(about, Mapping):
        raise UserError(f"{where} holds no mapping")
    name = about.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        raise UserError(f"{where}: timm has no architecture {str(name)[:80]!r}")
    return name, arguments(about.get("model_args") or {}, f"{where}: model_args")


def transformers_config(name: str, **where: Any) -> dict[str, Any]:
    """config.json of a transformers model, read and looked at before anything is built from it. UserError when it asks
    for the kernel of a repository, which is compiled code, or has timm build something else than an architecture.

    Raises what transformers raises when there is none.
    """
    from transformers import PreTrainedConfig

    about, _ = PreTrainedConfig.get_config_dict(name, **where)
    for key, value in _texts(about):
        if key.endswith("_implementation") and not re.fullmatch(r"\w*", value):
            raise UserError(f"{name}/config.json asks for {key}={value[:80]!r}, code from elsewhere that is not run")
    if "architecture" in about:
        config(about, f"{name}/config.json")
    return about


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _texts(value, key if key.endswith("_implementation") else str(name))
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, key)
    elif isinstance(tree, str):
        yield key, tree


def folder(path: Path) -> None:
    """UserError unless the folder has its weights as safetensors: timm would go on to pickles."""
    if not (path / WEIGHTS).is_file():
        there = sorted(p.name for p in path.glob("*") if p.suffix in (".bin", ".pth", ".pt", ".pkl"))
        hint = f"; {there[0]} is a pickle, which can run code and is not read: convert it first" if there else ""
        raise UserError(f"{path} has no {WEIGHTS}{hint}")


def pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of somebody's .pth, for those who ask for it by `backbone.pickled`.

    torch's restricted unpickler builds tensors and containers and calls nothing else. What training code wraps around
    a network's tensors is taken off: the dictionaries of a training state, and the prefixes of wrappers (a DINOv2
    checkpoint has teacher -> backbone.blocks.0...). Raises UserError when it holds no tensors.
    """
    found = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("teacher", "state_dict", "model", "model_state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name")
    for prefix in ("module.", "backbone."):
        inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        tensors = inside or tensors
    return tensors


def released(name: str) -> dict[str, str]:
    """`pretrained_cfg_overlay` with which timm fetches its released weights as safetensors. UserError: there are none.

    timm asks for a repository's safetensors first, and then for its pickle; with the name there is no second.
    """
    import timm

    about = timm.get_pretrained_cfg(name)
    file = (about and about.hf_hub_filename) or "pytorch_model.bin"
    if about is None or not about.hf_hub_id or not file.endswith((".bin", ".safetensors")):
        raise UserError(f"timm has the weights of {name} only as a pickle, which can run code and is not read")
    known = {"pytorch_model.bin": WEIGHTS, "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
    return {"hf_hub_filename": known.get(file, file.removesuffix(".bin").removesuffix(".safetensors") + ".safetensors")}
