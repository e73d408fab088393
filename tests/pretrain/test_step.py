"""What a step must not do: take a gradient that is not finite, leave tensors to the collector, wait for the device."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from pretrain import garbage
from pretrain.keeper import Keeper
from pretrain.loop import main
from tests.pretrain.conftest import lines


def parameter_after(steps: list[float], fused: bool) -> dict[str, torch.Tensor]:
    """A parameter and its moments after gradients of these values; one that is not finite asks for no step."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, fused=True)
    for value in steps:
        parameter.grad = torch.full((7,), value)
        if fused:
            optimizer.found_inf = (~torch.isfinite(parameter.grad.norm())).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif torch.isfinite(parameter.grad.norm()):
            optimizer.step()
    return {"parameter": parameter.detach(), **optimizer.state[parameter]}


def test_the_fused_optimiser_leaves_out_what_the_host_would() -> None:
    steps = [0.3, float("nan"), -0.2, float("inf"), float("inf"), 0.1]
    there, here = parameter_after(steps, fused=True), parameter_after(steps, fused=False)
    assert all(torch.equal(there[name], here[name]) for name in here)
    assert there["step"] == 3


def test_a_step_that_is_not_finite_is_not_taken(tiny: list[str], tmp_path: Path, monkeypatch) -> None:
    clip, calls = Accelerator.clip_grad_norm_, []

    def poisoned(self, parameters, *rest):
        parameters = list(parameters)
        calls.append(None)
        if len(calls) == 3:
            next(p for p in parameters if p.grad is not None).grad[:] = float("nan")
        return clip(self, parameters, *rest)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", poisoned)
    monkeypatch.setattr(Keeper, "due", lambda *_: True)  # also after a bad step
    out = tmp_path / "run"
    assert main([*tiny, f"out={out}", "save.every=1", "save.keep=9", "log.every=2"]) == 0
    model = [load_file(out / "checkpoints" / f"step-{n}" / "model.safetensors") for n in (2, 3, 4)]
    moments = [load_file(out / "checkpoints" / f"step-{n}" / "optim.safetensors") for n in (2, 3, 4)]
    student = [k for k in model[0] if k.startswith("student.")]
    assert all(torch.equal(model[0][k], model[1][k]) for k in student)
    assert all(torch.equal(moments[0][k], moments[1][k]) for k in moments[0])
    assert any(not torch.equal(model[1][k], model[2][k]) for k in student)
    assert all(tensor.isfinite().all() for tensor in model[2].values())
    assert [line["skipped"] for line in lines(out)] == [0, 0, 1, 0]
    assert all(line["loss"] > 0 for line in lines(out)[3:])


def test_nothing_is_collected_but_by_hand_and_steps_leave_no_tensors(tiny: list[str], tmp_path: Path, monkeypatch):
    seen: list[int] = []

    def collect(step: int) -> None:
        assert not gc.isenabled()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        if step > 1:
            seen.append(sum(isinstance(thing, torch.Tensor) and thing.numel() > 64 for thing in gc.garbage))
        gc.set_debug(0)
        gc.garbage.clear()

    monkeypatch.setattr(garbage, "collect", collect)
    assert main([*tiny, f"out={tmp_path / 'run'}", "log.every=9", "save.every=9"]) == 0
    assert seen == [0, 0, 0]
    assert gc.isenabled()


@pytest.mark.gpu
def test_the_host_never_waits_for_the_device_between_log_points(tiny: list[str], tmp_path: Path, monkeypatch) -> None:
    from pretrain import record

    inside = record.Record.step

    def step(self, number, *rest) -> None:
        torch.cuda.set_sync_debug_mode("default")
        inside(self, number, *rest)
        if 1 < number < 5:  # the first step allocates, compiles and measures; the log point is the sixth
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(record.Record, "step", step)
    try:
        assert main([*tiny, f"out={tmp_path / 'run'}", "steps=6", "log.every=6", "save.every=6"]) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
