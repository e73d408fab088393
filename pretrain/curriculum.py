"""Small crops first (`views.curriculum`): which size the crops of a step have.

After FastDINOv2 (arXiv 2507.03779), which spends 75 % of its run at half size. What is coarse is learnt from a quarter
of the patches, and the rest of the run sharpens it. Schedules (learning rate, teacher) go on as if nothing happened.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybridssl.view_options import ViewOptions
from pretrain.recipe import Recipe


@dataclass(frozen=True)
class Curriculum:
    """The views at a position of the stream: a function of it, like all that is drawn.

    So a resumed run, other workers and other numbers of processes cut the same crops, and a step has one size.
    """

    small: ViewOptions
    full: ViewOptions
    until: int  # the first position at full size

    def views(self, position: int) -> ViewOptions:
        return self.small if position < self.until else self.full

    def decode_at_least(self, position: int) -> int:
        return self.views(position).decode_at_least()


def curriculum(recipe: Recipe, patch: int) -> Curriculum:
    """UserError where half the size is too small."""
    full, steps = recipe.views, small_steps(recipe)
    return Curriculum(full.halved(patch) if steps else full, full, steps * recipe.batch.size)


def small_steps(recipe: Recipe) -> int:
    """Steps from the start whose crops have half their size."""
    return min(round(recipe.views.curriculum * recipe.steps), recipe.steps - 1)  # it ends at full size
