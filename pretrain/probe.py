"""The in-loop probe: how good are the teacher's frozen features right now, on images it is not trained on?"""

from __future__ import annotations

import numpy as np

from hybridssl import dist
from hybridssl.backbone import Backbone
from hybridssl.errors import UserError
from hybridssl.probe import quick_probe
from pretrain import data
from pretrain.reach import within_reach
from pretrain.recipe import Recipe
from shards.index import Index


class InLoopProbe:
    """kNN and ridge probe, train split -> val split of `data.probe` (or of the training index when that is not given).

    All processes take part, each with an equal share of the images, and all learn the answer.

    Silent (never due) when there are not two labelled classes in both splits. With `probe.keep`, the same on a general
    set, also before the first step: what a continued backbone could do already, and whether it still can.
    """

    def __init__(self, recipe: Recipe, index: Index) -> None:
        self.recipe = recipe
        self.home = _named("data.probe", recipe.data.probe, recipe, index) or _Judged(index, recipe)
        self.kept = _named("probe.keep", recipe.probe.keep, recipe, index)

    def due(self, step: int) -> bool:
        regular = step % self.recipe.probe.every == 0 or step == self.recipe.steps
        return regular and (self.kept is not None or (self.home.useful and step > 0))

    def __call__(self, backbone: Backbone, step: int) -> dict[str, float]:
        found = self.home(backbone) if self.home.useful and step else {}
        if self.kept:
            judged = self.kept(backbone)
            found |= {key.replace("probe/", "keep/"): judged[key] for key in ("probe/knn", "probe/linear")}
        return found


class _Judged:
    """A labelled index as the probe uses it."""

    def __init__(self, index: Index, recipe: Recipe) -> None:
        self.index, self.recipe = index, recipe
        self.train, self.val = (self._pick(split) for split in ("train", "val"))
        labels = index.column("label")
        self.useful = all(len(np.unique(labels[numbers])) > 1 for numbers in (self.train, self.val))

    def _pick(self, split: str) -> np.ndarray:
        """At most `probe.images` labelled samples, spread evenly over the split, or what is within reach of it."""
        numbers = np.flatnonzero(self.index.column("split") == self.index.splits.index(split))  # perhaps none
        numbers = within_reach(self.index, numbers[self.index.column("label")[numbers] >= 0])
        step = max(1, -(-len(numbers) // self.recipe.probe.images))
        return numbers[::step]

    def __call__(self, backbone: Backbone) -> dict[str, float]:
        labels = self.index.column("label")
        train, val = (self._features(backbone, numbers) for numbers in (self.train, self.val))
        return dist.of_first(lambda: quick_probe(train, labels[self.train], val, labels[self.val]))

    def _features(self, backbone: Backbone, numbers: np.ndarray) -> np.ndarray:
        """[N, D]. A pass of a sharded backbone needs all processes, so each makes as many, with some images again."""
        shares = np.resize(numbers, (dist.world_size(), -(-len(numbers) // dist.world_size())))
        threads = max(self.recipe.data.workers, 1)  # on the cores of the loader, which has made ahead what it may
        mine = data.features(backbone, self.index, shares[dist.rank()], self.recipe.views, threads=threads)
        return np.concatenate(dist.gather_objects(mine))[: len(numbers)]


def _named(key: str, root: str, recipe: Recipe, index: Index) -> _Judged | None:
    """The set that `key` names, if it names one. Raises UserError where nothing can be judged on it."""
    if not root:
        return None
    found = _Judged(recipe.data.open(root), recipe)
    if not found.useful:
        raise UserError(f"{key}={found.index}: needs two labelled classes in its train and val splits")
    if found.index.channels != index.channels:
        raise UserError(
            f"{key}={found.index} has images of {found.index.channels} channels, "
            f"{index} of {index.channels}: name a set like the one that is trained on"
        )
    return found
