"""batch.micro=auto: what is chosen, and that what is tried is a step."""

from __future__ import annotations

import gc
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridssl import dist
from pretrain import fit
from pretrain.command import load
from pretrain.loop import main
from shards.index import Index
from tests.pretrain.conftest import lines

CPU = torch.device("cpu")


@given(share=st.integers(1, 4096), room=st.integers(0, 5000))
def test_the_largest_divisor_that_fits(share: int, room: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= room

    divisors = [n for n in range(1, share + 1) if share % n == 0]
    assert fit.largest(share, fits) == max((n for n in divisors if n <= room), default=0)
    assert len(asked) == len(set(asked)) <= 2 + len(divisors).bit_length()


def test_only_whole_groups_are_tried() -> None:
    """What objectives.spread compares must not be parted: of 96 images in groups of 16 neither 24 nor 8."""
    asked: list[int] = []
    assert fit.largest(96, lambda size: asked.append(size) or size <= 40, together=16) == 32
    assert all(size % 16 == 0 for size in asked)
    assert fit.largest(96, lambda size: size <= 8, together=16) == 0
    assert fit.largest(40, lambda size: True, together=16) == 40  # the model says what is wrong


def recipe_of(arguments: list[str], *more: str):
    loaded = load([*arguments, *more])
    return loaded, Index.open(loaded.data.train)


def test_a_cpu_takes_the_whole_batch_and_writes_it_down(tiny, tmp_path) -> None:
    arguments = [*tiny, f"out={tmp_path / 'run'}", "steps=1", "batch.micro=auto"]
    assert main(arguments) == 0
    assert "micro: 0" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert lines(tmp_path / "run")
    assert main([*arguments]) == 0  # and the same command finds its run again


@pytest.mark.parametrize("micro", [8, 4])
def test_what_is_tried_is_a_whole_step(micro: int, tiny, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, index = recipe_of([*tiny, f"out={tmp_path}"])
    seen: list[int] = []
    build = fit.build_student

    def watched(*args, **more):
        learner = build(*args, **more)
        learner.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[2])))
        return learner

    monkeypatch.setattr(fit, "build_student", watched)
    fit.try_step(recipe, index, CPU, 8, micro)
    assert seen == [micro] * (8 // micro)


def test_what_is_tried_has_full_size(tiny, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, index = recipe_of([*tiny, f"out={tmp_path}", "views.curriculum=0.75"])
    seen: list[int] = []
    render = fit.render
    monkeypatch.setattr(fit, "render", lambda batch, own: seen.append(batch.global_.shape[-1]) or render(batch, own))
    fit.try_step(recipe, index, CPU, 8, 8)
    assert seen == [32]


def test_a_trial_talks_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.dist, "get_world_size", lambda: 3)
    assert dist.world_size() == 3
    with pytest.raises(ZeroDivisionError), dist.alone():
        1 / (dist.world_size() - 1)
    assert dist.world_size() == 3


class Memory:
    """torch.cuda, as far as a trial asks it: `held` bytes, and the peak of them since it was last reset."""

    OutOfMemoryError = torch.cuda.OutOfMemoryError

    def __init__(self, free: int, held: int = 7) -> None:
        self.free, self.held, self.peak = free, held, held

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.free, self.free

    def memory_allocated(self, device: torch.device) -> int:
        return self.held

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.held

    def empty_cache(self) -> None:
        pass

    def step(self, *arguments: Any) -> None:
        """A trial of one byte an image of the micro-batch, the last argument."""
        self.peak = max(self.peak, self.held + arguments[-1])
        if arguments[-1] > 2 * self.free:
            raise self.OutOfMemoryError("full")


@pytest.mark.parametrize(("micro", "fits"), [(64, True), (99, False), (300, False)])
def test_the_peak_of_a_trial_is_not_told_as_that_of_the_run(
    micro: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(free=100)
    monkeypatch.setattr(fit.torch, "cuda", memory)
    monkeypatch.setattr(fit, "try_step", memory.step)
    assert fit._fits(cast(Any, None), cast(Any, None), CPU, micro, micro) is fits
    assert memory.peak == memory.held


@pytest.mark.gpu
def test_less_memory_chooses_a_smaller_micro_batch(tiny, tmp_path) -> None:
    recipe, index = recipe_of([*tiny, f"out={tmp_path}", "batch.micro=auto", "batch.size=256", "views.global_size=224"])
    device = torch.device("cuda")
    whole = fit.with_micro_batch(recipe, index, device, 1).batch.micro
    assert whole == 256
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()  # no trial is told as the run's peak
    fit.try_step(recipe, index, device, 256, 256)
    room = torch.cuda.max_memory_allocated() * 3 // 4  # of what that took, on however large a device
    gc.collect()
    torch.cuda.empty_cache()
    ballast = torch.empty(torch.cuda.mem_get_info()[0] - room, dtype=torch.uint8, device=device)
    less = fit.with_micro_batch(recipe, index, device, 1).batch.micro
    del ballast
    assert isinstance(less, int)
    assert 0 < less < 256
