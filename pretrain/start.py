"""Before the first step: what a run goes on from, its precision, its processes, and the model spread over them."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import AutocastKwargs, parse_flag_from_env

from hybridssl import dist, precision, run, sharding
from hybridssl.errors import UserError
from hybridssl.student import Student
from pretrain.recipe import Recipe, changes
from shards.address import public
from shards.index import Index

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def check(recipe: Recipe, out: Path, index: Index) -> dict[str, Any] | None:
    """The state to resume from, or None for a new run. Raises UserError when `out` holds something else, and where a
    key of the recipe would do nothing."""
    if recipe.probe.keep and not recipe.probe.every:
        raise UserError(
            f"probe.keep={public(recipe.probe.keep)} would never be judged, for probe.every=0 says no probe: give "
            "probe.every, such as probe.every=1000, or leave probe.keep out"
        )
    if not run.checkpoints(out):
        return None
    if recipe.resume == "never":
        raise UserError(f"{out} holds a run already, and resume=never: choose another out=...")
    state = run.read_state(out)
    chosen = ("precision",) if recipe.precision == "auto" else ()  # by the machine that the run began on
    more = ("steps",) if recipe.steps >= state["recipe"]["steps"] else ()  # its schedules are shares of the run
    if changed := changes(state["recipe"], recipe, (*chosen, *more)):
        raise UserError(
            f"{out} is a run of another recipe; these keys differ:\n  " + "\n  ".join(changed) + "\n"
            "Give the run another folder with out=..., or repeat the old values to go on with it"
        )
    if state["data"]["index_sha256"] != index.sha256:
        raise UserError(f"{index} is not what {out} was trained on (its index changed); use another out=...")
    if again := taken_again(recipe, state["step"], state["recipe"]["steps"]):
        raise UserError(
            f"steps={recipe.steps} would put {out} back to {state['step'] / recipe.steps:.0%} of its length, before "
            f"turns that it has taken: {', '.join(again)}. What learns would rest, and crops shrink, once more. Branch "
            f"off instead, with the turns where they were: out=... branch={out} steps={recipe.steps} "
            + " ".join(f"{key}={share:.4g}" for key, share in again.items())
        )
    return state


def taken_again(recipe: Recipe, step: int, steps: int) -> dict[str, float]:
    """Keys of what a run of `steps` has begun or ended by `step`, and one of `recipe.steps` has not; with the shares of
    the longer run that leave them where they were."""
    turns = {"optim.heads_first": (0.0, recipe.optim.heads_first), "views.curriculum": (0.0, recipe.views.curriculum)}
    for name, options in recipe.objectives.items():
        words = getattr(options, "init", "") == "text"
        for key in ("start", "head_first", "freeze_last", *(["unfreeze_at"] if words else [])):
            since = options.start if key == "freeze_last" else 0.0  # which it counts from
            turns[f"objectives.{name}.{key}"] = since, getattr(options, key, 0.0)
    return {
        key: share * steps / recipe.steps
        for key, (since, share) in turns.items()
        if step / recipe.steps < since + share <= step / steps and share and share < 1
    }


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
        torch.set_num_threads(recipe.threads or max(1, dist.cores() // accelerator.num_processes))
        keep_freed_memory()
    return accelerator


def keep_freed_memory() -> None:
    """Have glibc hold on to what is freed, as torch does on a GPU: a step frees what the next one asks for, and fresh
    pages of the kernel's cost a sixth of it (docs/log.md). Elsewhere than on Linux with glibc nothing happens."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


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
