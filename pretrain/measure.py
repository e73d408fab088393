"""How fast would it be? One micro-batch of the proposed recipe through student, teacher and back, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hybridssl import efficiency, precision, student
from hybridssl.views import render
from pretrain import data, fit
from pretrain.assemble import build_student
from pretrain.recipe import Recipe
from shards.index import Index

FEW = 16  # images that are enough on a CPU, which gains nothing from more at a time


@dataclass(frozen=True)
class Measured:
    images_per_second: float  # of the whole machine
    loader: float  # images a second of one loader process
    images: int  # in the pass that was timed
    peak: float = 0.0  # GiB of GPU memory; 0 on a CPU


def measure(recipe: Recipe, index: Index, processes: int = 1, cores: int = 1) -> Measured:
    """Time one pass with fresh weights (nothing is fetched). Several GPUs are taken to be as many times as fast.

    Raises UserError where the recipe cannot be built, torch.cuda.OutOfMemoryError where a pass does not fit.
    """
    cuda = torch.cuda.is_available()
    device, workers = torch.device("cuda" if cuda else "cpu"), max(recipe.data.workers, 1)
    if recipe.precision == "auto":  # as the run will find for itself
        recipe = replace(recipe, precision="bf16" if precision.faster_in_bf16(device) else "no")
    recipe = fit.with_micro_batch(recipe, index, device, processes)
    assert recipe.batch.micro != "auto"
    micro = recipe.batch.micro or recipe.batch.size // processes
    if not cuda:
        together = data.together(recipe)
        micro = min(micro, max(FEW // together, 1) * together)
    recipe = replace(
        recipe,
        views=replace(recipe.views, curriculum=0.0),  # at full size: the slowest that it will be
        data=replace(recipe.data, workers=0),
        batch=replace(recipe.batch, size=micro, micro=micro),
    )
    learner = build_student(recipe, index, micro, fresh=False).to(device)
    teacher = student.make_teacher(learner)
    for one in (learner, teacher):
        efficiency.apply(one.backbone, recipe.efficiency)
    batches = iter(data.loader(recipe, index, "clean" in learner.views, learner.backbone.patch_size, 0, 0, 1))
    loading = _seconds(lambda: next(batches)) / micro
    batch = next(batches).to(device)

    def one_pass() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            view = render(batch, recipe.views)
            (target,) = student.targets(teacher, [view], [batch], fit.END)
            losses, _ = learner(view, target, batch, fit.END)
        sum(losses.values()).backward()  # type: ignore[union-attr]  # weights would not change the time
        learner.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()

    one_pass()  # the first is slow everywhere
    model = min(_seconds(one_pass) for _ in range(3 if cuda else 1)) / micro
    if cuda:
        speed = processes * min(1 / model, workers / loading)
        return Measured(speed, 1 / loading, micro, torch.cuda.max_memory_allocated() / 2**30)
    return Measured(1 / (model + loading / cores), 1 / loading, micro)  # model and loader share the cores


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
