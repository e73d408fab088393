"""A run that begins in the middle of another one: other objectives, labels that came later, larger crops for the end.

    accelerate launch pretrain recipe=... branch=runs/a/checkpoints/step-70000 out=runs/b objectives.labels={}

What both have goes on as it was, moments and place in the data too; what only this run has begins here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from hybridssl import optim, run
from hybridssl.errors import UserError
from hybridssl.recipe import differences, to_dict
from hybridssl.schedule import first_step
from hybridssl.student import Student
from pretrain.recipe import Recipe
from shards.index import Index

DIGESTS = "pretraining.safetensors"
MEANING = ("init", "kind", "head", "ontology", "columns")  # options by which tensors of like shapes differ


@dataclass(frozen=True)
class Branch:
    """Where a run begins. `kept`: prefixes of the parameters that go on; `begun`: objectives that are new."""

    folder: Path  # the checkpoint
    step: int
    position: int  # in the stream
    kept: tuple[str, ...]
    begun: tuple[str, ...]
    before: tuple[dict[str, Any], ...]  # what the weights have learnt from until here, a run each, the oldest first

    def __str__(self) -> str:
        new = f"; new: {', '.join(self.begun)}" if self.begun else ""
        return f"branch of {self.folder} at step {self.step}{new}"

    def load_moments(self, optimizer: torch.optim.Optimizer, learner: Student) -> None:
        """Those of what goes on."""
        moments = run.read_tensors(self.folder, "optim.safetensors")
        optim.load_named_state(optimizer, learner, {k: v for k, v in moments.items() if k.startswith(self.kept)})


def take(recipe: Recipe, index: Index, learner: Student, teacher: Student) -> Branch:
    """Load the weights of `recipe.branch` (a run folder or one of its checkpoints) into both, on the CPU and whole.

    An objective goes on if it has the tensors that it had there, by name, shape and meaning; else it begins anew. So
    does one that had yet to start there, and should have started here.
    Raises UserError when there is no such checkpoint, or its backbone, batch size or length is another.
    """
    folder = run.latest(recipe.branch)
    state, tensors = run.read_state(folder), run.read_tensors(folder)
    _check(recipe, folder, state)
    kept, begun, there = ["backbone."], [], state["recipe"]
    classes = state["data"].get("classes") == list(index.classes)
    for name, objective in learner.each().items():
        same = all(
            _shapes(own.state_dict()) == _shapes(_below(tensors, f"{who}.objectives.{name}."))
            for who, own in (("student", objective), ("teacher", teacher.each()[name]))
        )
        same &= _means_the_same(name, recipe, there) and (classes or not objective.per_class)
        same &= not _overdue(name, recipe, there, state["step"])
        kept += [f"objectives.{name}."] if same else []
        begun += [] if same else [name]
    for who, model in (("student", learner), ("teacher", teacher)):
        for prefix in kept:
            found = _below(tensors, f"{who}.{prefix}")
            own = model.get_submodule(prefix.removesuffix("."))
            if prefix == "backbone." and _shapes(own.state_dict()) != _shapes(found):
                raise UserError(_unlike(recipe, folder, state))
            own.load_state_dict(found)
    for name in begun:  # what compares with the backbone as it was means this one
        teacher.each()[name].begin(teacher.backbone)
    position, before = state["data"]["position"], lineage(state)
    return Branch(folder, state["step"], position, tuple(kept), tuple(begun), before)


def _means_the_same(name: str, recipe: Recipe, there: Mapping[str, Any]) -> bool:
    """Whether tensors of like shapes stand for the same thing: a head that began at random is none that is to begin at
    words, that of one column none of another, and what has learnt from one text encoder knows nothing of the next."""
    now, tower = recipe.objectives[name], hasattr(recipe.objectives[name], "tower")
    text = _alike(recipe.text, there.get("text", {}), ("encoder", "pooling")) if tower else True
    return text and _alike(now, there.get("objectives", {}).get(name, {}), MEANING)


def _alike(now: object, there: Mapping[str, Any], keys: Sequence[str]) -> bool:
    return all(there[key] == getattr(now, key) for key in keys if hasattr(now, key) and key in there)


def _overdue(name: str, recipe: Recipe, there: Mapping[str, Any], step: int) -> bool:
    """Whether it would have started before `step` here, and had not there: it has learnt nothing yet, and of what it
    looks back at (the teacher of its first step) it holds what the backbone began with."""
    before = there.get("objectives", {}).get(name, {}).get("start", 0.0)
    return first_step(recipe.objectives[name].start, recipe.steps) < step <= first_step(before, there["steps"])


def lineage(state: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """What a checkpoint's weights have learnt from: until which step, and from which images."""
    data = state["data"]
    own = {"step": state["step"], **{key: data[key] for key in ("samples", "sources", "synthetic")}}
    return *data.get("before", ()), own


def digests(recipe: Recipe, own: np.ndarray) -> np.ndarray:
    """Of all images that the weights may have seen: `own`, and those of the run that this is a branch of."""
    if not recipe.branch:
        return own
    files = [place / DIGESTS for place in (_origin(recipe), Path(recipe.out))]  # its own, where it goes on without it
    return np.unique(np.concatenate([own, *(load_file(file)["digest"] for file in files if file.is_file())]))


def _origin(recipe: Recipe) -> Path:
    """The run folder that `recipe.branch` is, or lies in."""
    named = Path(recipe.branch).absolute()  # or `step-100`, named from inside its folder, would have no parents
    return named if run.checkpoints(named) else named.parent.parent


def _check(recipe: Recipe, folder: Path, state: Mapping[str, Any]) -> None:
    there = state["recipe"].get("batch", {}).get("size")
    if there != recipe.batch.size:
        raise UserError(
            f"branch: {folder} was trained with batch.size={there}, this run has {recipe.batch.size}: steps would "
            f"not count the same images. Say batch.size={there}"
        )
    if state["step"] >= recipe.steps:
        raise UserError(
            f"branch: {folder} is at step {state['step']}, where this run ends (steps={recipe.steps}): name an "
            "earlier checkpoint, or raise steps"
        )
    if not (seen := _origin(recipe) / DIGESTS).is_file():
        raise UserError(
            f"branch: {seen} is missing, by which evaluation knows the images that the weights of {folder} have seen: "
            "name the checkpoint inside its run folder, or copy the file along to where it is looked for"
        )


def _unlike(recipe: Recipe, folder: Path, state: Mapping[str, Any]) -> str:
    """Why its backbone does not fit."""
    there, own = state["backbone"], to_dict(recipe.backbone)
    size = there["options"].get("image_size") or there["image_size"]
    changed = differences(there["options"], own, ("image_size", "weights"))
    if not changed and size != (recipe.backbone.image_size or recipe.views.global_size):
        return (
            f"branch: {folder} has position embeddings for {size} px. Add backbone.image_size={size}: they are "
            "resampled for views of another size as they come"
        )
    keys = "".join(f"\n  backbone.{line}" for line in changed)
    return f"branch: {folder} holds another backbone than the recipe's ({recipe.backbone.name}){':' * bool(keys)}{keys}"


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in tensors.items()}
