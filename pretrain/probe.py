"""The in-loop probe: how good are the teacher's frozen features right now, on images it is not trained on?"""

from __future__ import annotations

import numpy as np

from hybridssl.backbone import Backbone
from hybridssl.probe import quick_probe
from pretrain import data
from pretrain.recipe import Recipe
from shards.index import Index


class InLoopProbe:
    """kNN and ridge probe, train split -> val split of `data.probe` (or of the training index when that is not given).

    Silent (never due) when there are not two labelled classes in both splits.
    """

    def __init__(self, recipe: Recipe, index: Index) -> None:
        self.recipe = recipe
        self.index = Index.open(recipe.data.probe) if recipe.data.probe else index
        self.train, self.val = (self._pick(split) for split in ("train", "val"))
        labels = self.index.column("label")
        self.useful = all(len(np.unique(labels[numbers])) > 1 for numbers in (self.train, self.val))

    def _pick(self, split: str) -> np.ndarray:
        """At most `probe.images` labelled samples, spread evenly over the split."""
        numbers = self.index.select((split,))
        numbers = numbers[self.index.column("label")[numbers] >= 0]
        step = max(1, -(-len(numbers) // self.recipe.probe.images))
        return numbers[::step]

    def due(self, step: int) -> bool:
        return self.useful and (step % self.recipe.probe.every == 0 or step == self.recipe.steps)

    def __call__(self, backbone: Backbone) -> dict[str, float]:
        labels = self.index.column("label")
        train, val = (data.features(backbone, self.index, n, self.recipe.views) for n in (self.train, self.val))
        return quick_probe(train, labels[self.train], val, labels[self.val])
