"""From a recipe and an index to what is trained: the backbone, fresh or loaded, with its objectives."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridssl import backbone as backbones
from hybridssl import lora, text
from hybridssl.errors import UserError
from hybridssl.objectives import Context
from hybridssl.objectives import build as build_objectives
from hybridssl.student import Student
from pretrain import data
from pretrain.columns import columns
from pretrain.recipe import Recipe
from shards.index import Index


def build_student(recipe: Recipe, index: Index, micro: int, fresh: bool = True, announce: bool = False) -> Student:
    """Backbone and objectives of `recipe`, on the CPU.

    fresh: as a run begins with them, from released weights and texts where the recipe names some. Otherwise only their
    shapes count, because a checkpoint fills them or a trial measures them: nothing that may have moved since is read.
    """
    backbone = backbones.build(recipe.backbone, index.channels, recipe.views.global_size)
    sizes = {"global_size": recipe.views.global_size} | (
        {"local_size": recipe.views.local_size} if recipe.views.local_count else {}
    )
    for key, size in sizes.items():
        if size % backbone.patch_size:
            patch, near = backbone.patch_size, max(round(size / backbone.patch_size), 1) * backbone.patch_size
            raise UserError(f"views.{key}={size} is not a multiple of the backbone's patch of {patch} px: try {near}")
    if recipe.backbone.weights and fresh:
        coverage = backbones.load_weights(backbone, recipe.backbone)
        if announce:
            print(f"{recipe.backbone.weights}: {coverage}")
    if recipe.backbone.lora:
        if not recipe.backbone.weights:
            raise UserError("backbone.lora moves a backbone that has learnt already: name it in backbone.weights")
        lora.add(backbone.model, recipe.backbone.lora)
    context = Context(
        dim=backbone.dim,
        classes=len(index.classes),
        named=torch.from_numpy(index.named()),
        prototypes=class_prototypes(recipe, index, backbone.dim, fresh),
        steps=recipe.steps,
        batch=recipe.batch.size,
        micro=micro,
        names=index.classes,
        counts=torch.from_numpy(data.label_counts(recipe, index)),
        columns=columns(recipe, index),
        patch=backbone.patch_size,
        patches=(recipe.views.global_size // backbone.patch_size) ** 2,
        channels=index.channels,
        encoder=recipe.text.encoder,
        pooling=recipe.text.pooling,
    )
    learner = Student(backbone, build_objectives(recipe.objectives, context))
    if recipe.views.left_out:
        whole = [f"objectives.{name}" for name, o in learner.each().items() if o.whole]
        if whole or not backbone.maskable:
            why = (
                f"{', '.join(whole)} reads all patches" if whole else f"{recipe.backbone.name} sees whole images alone"
            )
            raise UserError(f"views.left_out={recipe.views.left_out}, but {why}: set views.left_out=0")
    if "visible" in learner.views:
        if not recipe.views.hides_equally(context.patches):
            raise UserError(backbones.UNEQUAL)
        if recipe.views.curriculum:
            raise UserError(
                f"views.curriculum={recipe.views.curriculum}: the decoder of objectives.pixels.style=mae knows the "
                "places of one size alone: set views.curriculum=0, or objectives.pixels.style=simmim"
            )
    return learner


def class_prototypes(recipe: Recipe, index: Index, width: int, fresh: bool) -> Tensor | None:
    """What the text encoder knows of the classes, [K, width] (not fresh: zeros); None where none starts from text.

    A classes.csv beside the shards describes them unless the recipe names another table.
    """
    if not any(getattr(options, "init", "") == "text" for options in recipe.objectives.values()):
        return None
    if not fresh:
        return torch.zeros(len(index.classes), width)
    return text.class_prototypes(text.beside(recipe.text, index.root), index.classes, width, recipe.seed)
