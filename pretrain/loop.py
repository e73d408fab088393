"""The pretraining loop. `train` is the whole of it, read from top to bottom; what it calls are parts with a name.

accelerate launch pretrain recipe=derm-s data.train=data/derm out=runs/derm-s
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import timm.layers
import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import AutocastKwargs, parse_flag_from_env, set_seed
from torch import Tensor

from hybridssl import dist, efficiency, optim, precision, run, sharding, student
from hybridssl.cnn import synchronised
from hybridssl.errors import UserError
from hybridssl.recipe import differences, to_dict
from hybridssl.schedule import cosine, ramp
from hybridssl.student import Student
from hybridssl.views import render
from pretrain import command, data, fit, garbage, record, usage
from pretrain import recipe as recipes
from pretrain.assemble import build_student
from pretrain.batches import Batches
from pretrain.best import Best
from pretrain.guard import Diverged, Guard, Unchanged
from pretrain.keeper import Keeper
from pretrain.probe import InLoopProbe
from pretrain.recipe import Recipe
from pretrain.stop import ENOUGH, Stop
from pretrain.watchdog import Watchdog
from shards.errors import DataError
from shards.index import Index


def main(arguments: Sequence[str]) -> int:
    if usage.asked(arguments):
        print(usage.text())
        return 0
    try:
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
    learner = build_student(recipe, index, micro, announce=accelerator.is_main_process and state is None)
    learner = synchronised(learner, device)  # batch norms, where the backbone has any
    teacher = student.make_teacher(learner)
    for one in (learner, teacher):
        efficiency.apply(one.backbone, recipe.efficiency)
    model = spread(accelerator, recipe, learner, teacher)
    optimizer = optim.build(learner.backbone, learner.objectives, recipe.optim)
    if state:
        run.resume(out, learner, teacher, optimizer)
    step, position = (state["step"], state["data"]["position"]) if state else (0, 0)

    # The data: an endless stream of micro-batches, whose order is a function of the seed and the position.
    patch, clean = learner.backbone.patch_size, "clean" in learner.views
    accumulate = recipe.batch.size // (micro * world)
    stream = Batches(lambda start: data.loader(recipe, index, clean, patch, start, rank, world), index)
    stream.begin(position)

    # What watches, tells and keeps.
    guard = Guard(recipe.guard, device, state["guard"] if state else None)
    probe = InLoopProbe(recipe, index) if recipe.probe.every else None
    log = record.Record(recipe, accelerator, out, index, step, learner)
    keeper = Keeper(recipe, accelerator, index, len(log.selected))
    best = Best(recipe.probe.early_stop, dist.of_first(lambda: log.lines), since=log.small)
    stop, watchdog = Stop(), Watchdog(60 * recipe.timeout, rank, stream.whereabouts)
    if best.enough:  # it had ended early, and was started again
        stop.reason = ENOUGH

    with log, garbage.by_hand(), watchdog, stop, stream:
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
            for parameter in still:
                parameter.grad = None
            norm = clip(accelerator, model, recipe.optim.clip)
            # A bad step is refused on the device, where the fused AdamW reads it: asked by the host, each step would
            # wait for its end. Nothing of it stays: no weight, no average, no buffer.
            refused = guard.judge(step + 1, loss, norm, len(still), [key for batch in batches for key in batch.keys])
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
    """Return to the newest checkpoint after too many refused steps: its step. Raises Diverged the second time."""
    keeper.wait()
    found = run.checkpoints(out)
    checkpoint = run.latest(out) if found else None
    if checkpoint is None or checkpoint == guard.returned_to:
        raise Diverged(guard.diagnosis(lr, log.recipe.precision, str(checkpoint or "the start, as it was")))
    state = run.resume(checkpoint, learner, teacher, optimizer)
    guard.back_to(checkpoint, state["guard"])
    log.back(state["step"], f"{guard.options.patience} steps in a row were refused: back to {checkpoint}, other images")
    return state["step"]


def check(recipe: Recipe, out: Path, index: Index) -> dict[str, Any] | None:
    """The state to resume from, or None for a new run. Raises UserError when `out` holds something else."""
    if not run.checkpoints(out):
        return None
    if recipe.resume == "never":
        raise UserError(f"{out} holds a run already, and resume=never: choose another out=...")
    state = run.read_state(out)
    chosen = ("precision",) if recipe.precision == "auto" else ()  # by the machine that the run began on
    more = ("steps",) if recipe.steps >= state["recipe"]["steps"] else ()  # its schedules are shares of the run
    changed = differences(state["recipe"], to_dict(recipe), ignore=(*recipes.MAY_CHANGE, *chosen, *more))
    if changed:
        raise UserError(
            f"{out} is a run of another recipe; these keys differ:\n  " + "\n  ".join(changed) + "\n"
            "Give the run another folder with out=..., or repeat the old values to go on with it"
        )
    if state["data"]["index_sha256"] != index.sha256:
        raise UserError(f"{index} is not what {out} was trained on (its index changed); use another out=...")
    return state


def with_precision(recipe: Recipe, state: Mapping[str, Any] | None) -> Recipe:
    """`recipe` with its precision: of `auto` what the run began with, else what is faster on this device."""
    chosen = state["recipe"]["precision"] if state and recipe.precision == "auto" else recipe.precision
    # This starts the group of processes, as Accelerator would, but with our patience for one that hangs.
    limit = timedelta(minutes=recipe.timeout)
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=limit).device
    if chosen == "auto":  # all of them must choose alike
        assert device is not None  # from here on
        chosen = "bf16" if dist.all_agree(precision.faster_in_bf16(device)) else "no"
    return replace(recipe, precision=chosen)


def start_accelerator(recipe: Recipe) -> Accelerator:
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in recipe.log.trackers:  # accelerate itself would leave out a missing one without a word
        if name not in available:
            raise UserError(f"log.trackers: {name} is not installed; pip install {name}, or leave it out")
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):  # on a CPU accelerate would fall back to DDP without a word
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UserError(
                f"accelerate is set to {name}, and this loop spreads a model by itself: launch with --multi_gpu, and "
                "where it does not fit on one GPU add efficiency.sharded=true"
            )
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        log_with=list(recipe.log.trackers) or None,
        project_dir=recipe.out if recipe.log.trackers else None,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[AutocastKwargs(cache_enabled=not recipe.efficiency.sharded)],  # see sharding.shard
    )
    if accelerator.device.type == "cpu":  # the launcher allows one thread, for it expects a GPU to do the work
        torch.set_num_threads(recipe.threads or max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    # On a CPU plain matmul attention is faster than the fused kernel, whose backward is slow there (docs/log.md).
    timm.layers.set_fused_attn(accelerator.device.type == "cuda")
    return accelerator


def spread(accelerator: Accelerator, recipe: Recipe, learner: Student, teacher: Student) -> torch.nn.Module:
    """Both to the device; the student as the loop calls it: whole in every process (DDP), or parted (FSDP2).

    accelerate sees the student alone: the teacher needs no gradients, and the loader parts itself.
    """
    device = accelerator.device
    if not recipe.efficiency.sharded:
        teacher.to(device)
        return accelerator.prepare(learner)
    if accelerator.num_processes == 1:
        raise UserError(
            "efficiency.sharded=true parts the model over several processes, and there is one: start more with "
            "`accelerate launch --multi_gpu --num_processes N`, or leave the key out"
        )
    sharding.shard(learner, teacher, device)
    return accelerator.prepare_model(learner, evaluation_mode=True)  # which means: autocast, and no DDP


def clip(accelerator: Accelerator, model: torch.nn.Module, largest: float) -> Tensor:
    """The norm of the gradient over all parameters, as it was before it is cut to `largest`."""
    norm = accelerator.clip_grad_norm_(model.parameters(), largest)
    assert norm is not None  # only DeepSpeed clips by itself and tells no norm
    return sharding.whole(norm)


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
        total = total + options.weight * ramp(options.ramp, progress) * loss
    return total


def resting(learner: Student, recipe: Recipe, progress: float) -> list[torch.nn.Parameter]:
    """Parameters that do not move yet: last layers, text prototypes, and the backbone while heads warm up."""
    frozen = [p for objective in learner.each().values() for p in objective.frozen(progress)]
    if progress < recipe.optim.heads_first:
        frozen += learner.backbone.parameters()
    return frozen
