"""`batch.micro=auto`: the largest micro-batch that fits on this GPU, found by trying.

The effective batch stays what the recipe says, by accumulation; what was chosen goes into recipe.yaml. On a CPU, which
swaps rather than refuses, the whole batch of a process is one pass.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import replace

import torch

from hybridssl import dist, efficiency, optim, student
from hybridssl.errors import UserError
from hybridssl.views import render
from pretrain import data
from pretrain.assemble import build_student
from pretrain.recipe import Recipe
from shards.index import Index

END = 1.0  # of the run: all objectives have started, which takes the most
SPARE = 0.92  # of the memory that is free: what fragments, communication and log points need beside a step
# What the driver and libraries say where torch's own allocator has left them nothing: a kernel is loaded when it is
# first called, and cuBLAS asks for its own.
FULL = re.compile("out of memory|ALLOC_FAILED")


def with_micro_batch(recipe: Recipe, index: Index, device: torch.device, world: int) -> Recipe:
    """`recipe` with a number for `batch.micro`. Raises UserError where not even one image fits."""
    if recipe.batch.micro != "auto":
        return recipe
    if recipe.efficiency.sharded:
        raise UserError(
            "batch.micro=auto tries steps with the whole model on one GPU, which efficiency.sharded=true is there to "
            "avoid: give a number, such as batch.micro=8"
        )
    share = recipe.batch.size // world
    if device.type != "cuda" or recipe.batch.size % world:  # what does not divide, the loop refuses
        return replace(recipe, batch=replace(recipe.batch, micro=0))
    together = data.together(recipe)
    micro = largest(share, lambda size: dist.all_agree(_fits(recipe, index, device, share, size)), together)
    if not micro:
        few = "one image" if together == 1 else f"{together} images (objectives.spread.group)"
        raise UserError(
            f"batch.micro=auto: not even {few} of this recipe fit on {torch.cuda.get_device_name(device)}: set "
            "efficiency.checkpoint=true, or choose a smaller backbone or smaller crops"
        )
    return replace(recipe, batch=replace(recipe.batch, micro=micro))


def largest(share: int, fits: Callable[[int], bool], together: int = 1) -> int:
    """The largest divisor of `share` that `fits`, which may be asked of each; 0 where none does.

    By halving the list of divisors: memory grows with the micro-batch, so what fits is a beginning of it. together:
    asked of its multiples alone. Where it does not divide `share`, of `share`: the model itself says what is wrong.
    """
    divisors = [n for n in range(together, share + 1, together) if share % n == 0] or [share]
    if fits(divisors[-1]):  # the usual case on large GPUs, and then nothing else need be tried
        return divisors[-1]
    low, high = -1, len(divisors) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(divisors[middle]) else (low, middle)
    return divisors[low] if low >= 0 else 0


def _fits(recipe: Recipe, index: Index, device: torch.device, share: int, micro: int) -> bool:
    """Whether a step of `share` images in passes of `micro` stays within the memory that is free now."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with dist.alone():  # one process may run out of memory where another does not, and must not leave it waiting
            try_step(recipe, index, device, share, micro)
        return torch.cuda.max_memory_allocated(device) - held < SPARE * free
    except RuntimeError as error:
        if not isinstance(error, torch.cuda.OutOfMemoryError) and not FULL.search(str(error)):
            raise
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the run tells its own peak, not that of a trial


def try_step(recipe: Recipe, index: Index, device: torch.device, share: int, micro: int) -> None:
    """One whole step with fresh weights: as many images held, as many seen at a time, as the real one."""
    alone = replace(
        recipe,
        views=replace(recipe.views, curriculum=0.0),  # full size takes the most
        batch=replace(recipe.batch, size=micro, micro=micro),
        data=replace(recipe.data, workers=0),
    )
    learner = build_student(alone, index, micro, fresh=False).to(device)
    teacher = student.make_teacher(learner)
    for one in (learner, teacher):
        efficiency.apply(one.backbone, recipe.efficiency)
    optimizer = optim.build(learner.backbone, learner.objectives, recipe.optim)
    loader = data.loader(alone, index, "clean" in learner.views, learner.backbone.patch_size, 0, 0, 1)
    batch = next(iter(loader))
    batches = [batch.to(device) for _ in range(share // micro)]  # copies: a step holds them all
    views = [render(batch, recipe.views) for batch in batches]
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        targets = student.targets(teacher, views, batches, END)
        for batch, view, target in zip(batches, views, targets, strict=True):
            losses, _ = learner(view, target, batch, END)
            torch.stack(list(losses.values())).sum().backward()
    optimizer.step()  # whose moments come into being here
    student.update_teacher(teacher, learner, 1.0)
