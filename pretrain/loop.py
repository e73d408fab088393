"""The pretraining loop. `train` is the whole of it, read from top to bottom; what it calls are parts with a name.

accelerate launch pretrain recipe=derm-s data.train=data/derm out=runs/derm-s
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from hybridssl import dist, efficiency, optim, run, sharding, student
from hybridssl.cnn import synchronised
from hybridssl.errors import UserError
from hybridssl.schedule import cosine, ramp
from hybridssl.student import Student
from hybridssl.views import render
from pretrain import branch, command, data, fit, garbage, keys, record, usage
from pretrain.assemble import build_student
from pretrain.batches import Batches
from pretrain.best import Best
from pretrain.guard import Diverged, Guard, Unchanged
from pretrain.keeper import Keeper
from pretrain.probe import InLoopProbe
from pretrain.recipe import Recipe
from pretrain.start import check, spread, start_accelerator, with_precision
from pretrain.stop import ENOUGH, Stop
from pretrain.watchdog import Watchdog
from shards.errors import DataError


def main(arguments: Sequence[str]) -> int:
    try:
        if usage.asked(arguments):
            print("\n\n".join(map(keys.told, usage.words(arguments))) or usage.text())
            return 0
        return train(command.load(arguments))
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3


def train(recipe: Recipe) -> int:
    """Run `recipe` to its end, from the newest checkpoint of `recipe.out` if there is one; returns the exit code."""
    out = Path(recipe.out)
    index = recipe.data.open()
    state = check(recipe, out, index)
    recipe = with_precision(recipe, state)
    accelerator = start_accelerator(recipe)
    device, world, rank = accelerator.device, accelerator.num_processes, accelerator.process_index

    # The model: student, its moving average the teacher, and the optimiser of the student.
    recipe = fit.with_micro_batch(recipe, index, device, world)
    set_seed(recipe.seed)
    micro = micro_batch(recipe, world)
    learner = build_student(recipe, index, micro, fresh=state is None, announce=accelerator.is_main_process)
    learner = synchronised(learner, device)  # batch norms, where the backbone has any
    teacher = student.make_teacher(learner)
    begun = branch.take(recipe, index, learner, teacher) if recipe.branch and not state else None
    for one in (learner, teacher):
        efficiency.apply(one.backbone, recipe.efficiency)
    model = spread(accelerator, recipe, learner, teacher)
    optimizer = optim.build(learner.backbone, learner.objectives, recipe.optim)
    step, position = 0, 0
    if begun:
        begun.load_moments(optimizer, learner)
        step, position = begun.step, begun.position
    if state:
        run.resume(out, learner, teacher, optimizer)
        step, position = state["step"], state["data"]["position"]

    # The data: an endless stream of micro-batches, whose order is a function of the seed and the position.
    patch, clean = learner.backbone.patch_size, "clean" in learner.views
    accumulate = recipe.batch.size // (micro * world)
    stream = Batches(lambda start: data.loader(recipe, index, clean, patch, start, rank, world), index)
    stream.begin(position)

    # What watches, tells and keeps.
    guard = Guard(recipe.guard, device, state["guard"] if state else None)
    probe = InLoopProbe(recipe, index) if recipe.probe.every else None
    before = begun.before if begun else state["data"].get("before", ()) if state else ()
    log = record.Record(recipe, accelerator, out, index, step, learner, before[-1]["step"] if before else 0)
    if begun:
        log.say(str(begun))
    keeper = Keeper(recipe, accelerator, index, len(log.selected), step, before)
    best = Best(recipe.probe.early_stop, dist.of_first(lambda: log.lines), since=max(log.turns))
    stop, watchdog = Stop(), Watchdog(60 * recipe.timeout, rank, stream.whereabouts)
    if best.enough:  # it had ended early, and was started again
        stop.reason = ENOUGH

    with log, garbage.by_hand(), watchdog, stop, keeper, stream:
        if probe and step == 0 and probe.due(step):
            log.write(step, probe(teacher.backbone, step))
        while step < recipe.steps and not stop.reason:
            watchdog.beat(f"step {step + 1}")
            progress = step / recipe.steps
            schedule = optim.set_hyperparameters(optimizer, recipe.optim, recipe.batch.size, progress)
            schedule["momentum"] = cosine(*recipe.teacher.momentum, progress)
            schedule |= {k: v for o in learner.each().values() for k, v in o.schedules(progress).items()}
            torch.manual_seed(step_seed(recipe.seed, step, rank))  # stochastic depth; nothing else draws here

            # Teacher first, over all micro-batches: assignment must see the effective batch, not a part of it.
            with log.meter.waiting():
                batches = [next(stream).to(device) for _ in range(accumulate)]
            views = [render(batch, recipe.views) for batch in batches]
            unchanged = Unchanged(learner, teacher)
            with accelerator.autocast():
                targets = student.targets(teacher, views, batches, progress)

            # Then the student, gradients summed over micro-batches and, at the last, averaged over processes.
            losses: dict[str, Tensor] = {}
            watch = log.due(step + 1)
            for i, (batch, view, target) in enumerate(zip(batches, views, targets, strict=True)):
                last = i == accumulate - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    parts, health = model(view, target, batch, progress, watch and last)
                    accelerator.backward(weighted(parts, recipe, progress) / accumulate)
                losses = {k: losses.get(k, 0.0) + v.detach() / accumulate for k, v in parts.items()}
            loss = weighted(losses, recipe, progress)

            still = resting(learner, recipe, progress)
            moving = len(learner.reaching(progress)) - len(still)  # neither goes back, so no two changes cancel out
            for parameter in still:
                parameter.grad = None
            norm = clip(accelerator, model, recipe.optim.clip)
            # A bad step is refused on the device, where the fused AdamW reads it: asked by the host, each step would
            # wait for its end. Nothing of it stays: no weight, no average, no buffer.
            refused = guard.judge(step + 1, loss, norm, moving, [key for batch in batches for key in batch.keys])
            optimizer.found_inf = refused  # type: ignore[attr-defined]
            optimizer.step()
            student.update_teacher(teacher, learner, schedule["momentum"], refused)
            unchanged.keep(refused)
            optimizer.zero_grad(set_to_none=True)
            step, position = step + 1, position + recipe.batch.size

            garbage.collect(step)
            stop.share()
            told = watch or bool(stop.reason)
            log.step(step, batches, losses, loss, norm, refused, schedule, health, told)
            if told:
                log.skipped_steps(guard.read())
            if guard.lost:
                step = go_back(out, guard, keeper, log, learner, teacher, optimizer, schedule["lr"])
                best = Best(recipe.probe.early_stop, dist.of_first(lambda: log.lines), since=max(log.turns))
                stream.begin(position)  # other images than those that led here
                continue
            better = False
            if probe and probe.due(step):
                found = probe(teacher.backbone, step)
                log.write(step, found)
                better = best.better(step, found)
                if best.enough:
                    stop.ask(ENOUGH)
            if keeper.due(step, guard) or stop.reason or better:
                keeper.save(step, position, learner, teacher, optimizer, guard, better)
            if told and (complaint := keeper.complaint()):
                log.say(complaint)
        watchdog.beat("the last checkpoint")
        unsaved = keeper.last()
    return log.finish(step, stop.reason, unsaved)


def go_back(
    out: Path,
    guard: Guard,
    keeper: Keeper,
    log: record.Record,
    learner: Student,
    teacher: Student,
    optimizer: torch.optim.Optimizer,
    lr: float,
) -> int:
    """Return to the newest checkpoint after too many refused steps: its step. Raises Diverged where that one has led
    here already."""
    keeper.wait()
    found = run.checkpoints(out)
    checkpoint = run.latest(out) if found else None
    if checkpoint is None or checkpoint == guard.returned_to:
        raise Diverged(guard.diagnosis(lr, log.recipe.precision, str(checkpoint or "the start, as it was")))
    state = run.resume(checkpoint, learner, teacher, optimizer)
    guard.back_to(checkpoint, state["guard"])
    log.back(state["step"], f"{guard.options.patience} steps in a row were refused: back to {checkpoint}, other images")
    return state["step"]


def clip(accelerator: Accelerator, model: torch.nn.Module, largest: float) -> Tensor:
    """The norm of the gradient over all parameters, as it was before it is cut to `largest` (0: it is not cut)."""
    norm = accelerator.clip_grad_norm_(model.parameters(), largest or math.inf)
    assert norm is not None  # only DeepSpeed clips by itself and tells no norm
    return sharding.whole(norm).to(accelerator.device)  # torch makes that of no gradient at all on the CPU


def step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def micro_batch(recipe: Recipe, world: int) -> int:
    try:
        return data.micro_batch(recipe, world)
    except ValueError as error:
        raise UserError(str(error)) from error


def weighted(losses: Mapping[str, Tensor], recipe: Recipe, progress: float) -> Tensor:
    """The sum of all losses, each times its objective's weight at this point of the run."""
    total = torch.zeros((), device=next(iter(losses.values())).device)
    for name, loss in losses.items():
        options = recipe.objectives[name.split("/")[0]]
        total = total + options.weight * ramp(options.ramp, progress, options.start) * loss
    return total


def resting(learner: Student, recipe: Recipe, progress: float) -> list[torch.nn.Parameter]:
    """Parameters that do not move yet: last layers, text prototypes, what waits for its objective to start, and the
    backbone while heads warm up, all of them or those of the only objectives that there are."""
    started = learner.started(progress).values()
    frozen = [*learner.waiting(progress), *(p for objective in started for p in objective.frozen(progress))]
    if progress < recipe.optim.heads_first or not learner.reaching(progress):
        frozen += learner.backbone.parameters()
    return frozen
