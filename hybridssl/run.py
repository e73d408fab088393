"""The run folder: its checkpoints found, checked and read again. `hybridssl/checkpoint.py` writes them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hybridssl import lora, optim, sharding
from hybridssl.backbone import Backbone, BackboneOptions, build
from hybridssl.errors import UserError
from hybridssl.files import sha256
from hybridssl.recipe import resolve

FORMAT = "hybridssl-run"
VERSION = 1
NEEDED = {"step": int, "recipe": dict, "backbone": dict, "data": dict, "sha256": dict}


@dataclass
class RunState:
    """All that a resumed run needs, by name. Seeds are in the recipe: every draw is a function of them and of position,
    or of step and process."""

    step: int
    images: int  # images learnt from so far, over all ranks
    recipe: dict[str, Any]  # the resolved recipe
    backbone: dict[str, Any]  # options, channels, image_size, mean, std: enough to rebuild it
    data: dict[str, Any]  # index, index_sha256, splits, samples, position in the stream, sources, classes, synthetic
    machine: str = ""  # what it runs on, for the report
    guard: dict[str, Any] = field(default_factory=dict)  # the gradient norms by which it judges a step


def latest(run: Path | str) -> Path:
    """The newest whole checkpoint of a run folder, or the checkpoint folder itself if that was given.

    A damaged one is named on stderr, and the one before it is taken. Raises UserError when none is whole.
    """
    run = Path(run)
    if (run / "state.json").is_file():
        return run
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run} holds no checkpoint (looked for checkpoints/step-N/state.json); is it a run folder?")
    for folder in found:
        damage = _damage(folder)
        if not damage:
            return folder
        _say_once(f"warning: {damage}; the checkpoint before it is used")
    raise UserError(f"{run} holds no whole checkpoint: {_damage(found[0])}")


def checkpoints(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, the newest first, looked at from outside only."""
    return sorted(run.glob("checkpoints/step-*[0-9]"), key=step_of, reverse=True)


def homes(checkpoint: Path) -> list[Path]:
    """Where the run folder of a checkpoint may be: from inside checkpoints/ a name such as step-10 has no parents to
    look in, and a link may hide them either way."""
    return [place.parent.parent for place in (checkpoint.absolute(), checkpoint.resolve())]


def step_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def read_state(run: Path | str) -> dict[str, Any]:
    """state.json of the newest checkpoint. Raises UserError for a foreign, newer or broken one."""
    path = latest(run) / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project")
    if not isinstance(state.get("version"), int):
        raise UserError(f"{path} tells no format version: it was changed by hand")
    if state["version"] > VERSION:
        raise UserError(f"{path} has format version {state['version']}, this program reads {VERSION}: update it")
    missing = [name for name in NEEDED if not isinstance(state.get(name), NEEDED[name])]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it was changed by hand, or damaged")
    return state


def read_tensors(run: Path | str, name: str = "model.safetensors") -> dict[str, Tensor]:
    """A tensor file of the newest checkpoint, checked against the sha256 that state.json recorded."""
    folder = latest(run)
    damage = _damage(folder)
    if damage:
        raise UserError(f"{damage}; take another checkpoint")
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / name} cannot be read: {error}") from error


def resume(run: Path, student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the newest checkpoint into the three and return its state."""
    folder = latest(run)
    tensors = read_tensors(folder)
    for prefix, model in (("student.", student), ("teacher.", teacher)):
        sharding.load(model, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    optim.load_named_state(optimizer, student, read_tensors(folder, "optim.safetensors"))
    return read_state(folder)


def load_backbone(run: Path | str, which: str = "teacher") -> tuple[Backbone, dict[str, Any]]:
    """The backbone of a run's newest checkpoint, in eval mode, low-rank updates merged, and the checkpoint's state."""
    state, prefix = read_state(run), f"{which}.backbone."
    options, channels, image_size = _described(state, f"{latest(run)}/state.json")
    tensors = {k.removeprefix(prefix): v for k, v in read_tensors(run).items() if k.startswith(prefix)}
    if not tensors:
        raise UserError(f"{latest(run)} has no {which} backbone; choose teacher or student")
    try:
        with torch.device("meta"):  # first without memory: a few digits more in state.json would ask for all there is
            outline = _built(options, channels, image_size)
    except UserError as error:
        raise UserError(f"{latest(run)}/state.json: {error}") from error
    if {k: v.shape for k, v in outline.state_dict().items()} != {k: v.shape for k, v in tensors.items()}:
        raise UserError(f"{latest(run)}/state.json describes another backbone than the weights beside it")
    backbone = _built(options, channels, image_size)
    backbone.load_state_dict(tensors)
    if options.lora:
        lora.merge(backbone.model)
    return backbone.eval(), state


def _described(state: dict[str, Any], where: str) -> tuple[BackboneOptions, int, int]:
    """Options, channels and image size of the backbone. UserError when state.json does not tell them."""
    about = state["backbone"]
    numbers = [about.get(name) for name in ("channels", "image_size")]
    statistics = [v for name in ("mean", "std") for v in (about.get(name) or ["none"])]
    if not all(type(n) is int and 0 < n <= 1 << 14 for n in numbers) or not all(_is_number(v) for v in statistics):
        raise UserError(f"{where} does not tell channels, image size, mean and std of the backbone")
    try:
        return resolve(BackboneOptions, [about.get("options")]), *numbers
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _built(options: BackboneOptions, channels: int, image_size: int) -> Backbone:
    backbone = build(options, channels, image_size)
    if options.lora:
        lora.add(backbone.model, options.lora)
    return backbone


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files; "" when they are what state.json recorded."""
    try:
        recorded = read_state(folder)["sha256"] if (folder / "state.json").is_file() else {}
    except UserError as error:
        return str(error)
    if not recorded:
        return f"{folder} has no state.json"
    for name, expected in recorded.items():
        path = folder / Path(name).name
        if not path.is_file():
            return f"{path} is missing"
        about = path.stat()
        if _digest(path, about.st_ino, about.st_size, about.st_mtime_ns) != expected:
            return f"{path} is damaged (its sha256 is not the recorded one)"
    return ""


@lru_cache(maxsize=64)
def _digest(path: Path, number: int, size: int, changed: int) -> str:
    """Of a file as it is now: a checkpoint of gigabytes is not read again for every question.

    `number`, the inode: a file that replaces another within a tick of the clock may have its size and time.
    """
    return sha256(path)


@lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)
