"""Bad steps: refused for everything, told with their samples, gone back from, given up on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hybridssl.backbone import Backbone
from hybridssl.objectives import spread
from pretrain.guard import ENOUGH, Guard, GuardOptions, Unchanged
from pretrain.keeper import Keeper
from pretrain.loop import main
from tests.pretrain.conftest import lines, losses

CPU = torch.device("cpu")


def judged(guard: Guard, norms: list[float], loss: float = 1.0, moving: int = 0) -> list[bool]:
    return [
        bool(guard.judge(i, torch.tensor(loss), torch.tensor(norm), moving, [f"k{i}"])) for i, norm in enumerate(norms)
    ]


def steady(count: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return (2.0 * torch.randn(count, generator=generator).mul(0.3).exp()).tolist()


def test_a_spike_is_far_above_the_median_of_the_last_norms() -> None:
    guard = Guard(GuardOptions(spike=6), CPU)
    assert not any(judged(guard, steady(100)))
    norms = torch.tensor(steady(100)).log()
    median = norms.median()
    bound = (median + 6 * 1.4826 * (norms - median).abs().median()).exp().item()  # the formula, from the outside
    assert judged(guard, [bound * 1.05, bound * 0.9]) == [True, False]


def test_few_norms_make_no_bound_and_zero_none_at_all() -> None:
    assert judged(Guard(GuardOptions(), CPU), [1.0] * (ENOUGH - 1) + [1e6]) == [False] * ENOUGH
    assert not any(judged(Guard(GuardOptions(spike=0), CPU), [1.0] * 50 + [1e6]))


def test_norms_that_hardly_differ_make_no_bound_of_a_hair() -> None:
    assert judged(Guard(GuardOptions(spike=12), CPU), [1.0] * 50 + [9.0, 13.0])[50:] == [False, True]


def test_other_moving_parameters_begin_again() -> None:
    guard = Guard(GuardOptions(), CPU)
    judged(guard, steady(50), moving=3)
    assert judged(guard, [1e4], moving=0) == [False]


@pytest.mark.parametrize(
    "keys",
    [
        ["objectives={dino: null, ibot: null, spread: null}", "objectives.labels.head_first=0.5"],
        ["objectives.labels.head_first=0.5"],
        ["objectives.anchor.start=0.5"],  # no parameter is its own
    ],
)
def test_losses_that_come_to_the_backbone_begin_again(keys: list[str], tiny: list[str], tmp_path: Path) -> None:
    """Or the norms of a head alone would be the bound of those of the whole."""
    arguments = [*tiny, *(f"objectives.{name}.freeze_last=0" for name in ("dino", "ibot") if len(keys) == 1), *keys]
    assert main([*arguments, f"out={tmp_path / 'run'}"]) == 0
    state = json.loads((tmp_path / "run/checkpoints/step-4/state.json").read_text())
    assert sum(norm is not None for norm in state["guard"]["norms"]) == 2


def test_a_norm_of_zero_is_compared_with_nothing() -> None:
    """Where nothing moves, or no image of a batch has a label."""
    guard = Guard(GuardOptions(), CPU)
    assert not any(judged(guard, [0.0] * 2 * ENOUGH))
    assert set(guard.state()["norms"]) == {None}
    assert judged(guard, [2.0]) == [False]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_what_is_not_finite_is_refused_and_named(loss: float, norm: float) -> None:
    guard = Guard(GuardOptions(patience=2), CPU)
    assert judged(guard, [norm], loss) == [True]
    (found,) = guard.read()
    assert (found["reason"], found["keys"]) == ("not finite", ["k0"])
    json.loads(json.dumps(found, allow_nan=False))  # readable by everybody
    assert not guard.lost
    judged(guard, [norm], loss)
    guard.read()
    assert guard.lost
    assert "not finite" in guard.diagnosis(1e-3, "bf16", "x")
    assert "precision=no" in guard.diagnosis(1e-3, "bf16", "x")


def test_a_resumed_guard_judges_as_the_first_one_would() -> None:
    first = Guard(GuardOptions(), CPU)
    judged(first, steady(200))
    second = Guard(GuardOptions(), CPU, json.loads(json.dumps(first.state())))
    more = [*steady(40), 60.0, 2.0]
    assert judged(first, more) == judged(second, more)
    assert first.state() == second.state()


def test_buffers_return_where_a_step_is_refused() -> None:
    norm = nn.BatchNorm1d(2)
    norm.register_buffer("queue", torch.zeros(3))
    unchanged = Unchanged(norm)
    norm(torch.full((4, 2), math.nan))
    norm.queue = torch.ones(3)  # replaced, not written into
    unchanged.keep(torch.tensor(0.0))
    assert norm.queue.sum() == 3
    unchanged.keep(torch.tensor(1.0))
    assert norm.queue.sum() == 0
    assert norm.running_mean.isfinite().all()
    assert norm.num_batches_tracked == 0


def poison(monkeypatch: pytest.MonkeyPatch, bad: range) -> list[int]:
    """The spread loss is not finite at these calls (one a step). Returns the calls so far."""
    inside, calls = spread.Spread.forward, []

    def forward(self, *arguments):
        calls.append(len(calls))
        found = inside(self, *arguments)
        return {k: v * (math.nan if calls[-1] in bad else 1.0) for k, v in found.items()}

    monkeypatch.setattr(spread.Spread, "forward", forward)
    return calls


def test_a_refused_step_moves_nothing_and_names_its_samples(tiny: list[str], tmp_path: Path, monkeypatch) -> None:
    poison(monkeypatch, range(2, 3))
    monkeypatch.setattr(Keeper, "due", lambda *_: True)  # a bad step as well
    out = tmp_path / "run"
    assert main([*tiny, f"out={out}", "save.keep=9"]) == 0
    before, after, later = (load_file(out / "checkpoints" / f"step-{n}" / "model.safetensors") for n in (2, 3, 4))
    assert all(torch.equal(before[key], after[key]) for key in before)  # student, teacher, centres
    assert sum(not torch.equal(after[key], later[key]) for key in before) > 20
    (told,) = lines_of(out / "skipped.jsonl")
    assert (told["step"], told["reason"], len(told["keys"])) == (3, "not finite", 8)
    assert [line["skipped"] for line in lines(out)] == [0, 0, 1, 0]


def test_too_many_in_a_row_go_back_to_the_checkpoint_with_other_images(
    tiny: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    calls = poison(monkeypatch, range(4, 7))
    out = tmp_path / "run"
    assert main([*tiny, f"out={out}", "steps=8", "save.every=2", "guard.patience=3"]) == 0
    assert len(calls) == 8 + 3  # steps 5, 6 and 7 were taken again
    assert "back to" in capsys.readouterr().err
    assert [line["step"] for line in lines(out)] == list(range(1, 9))
    state = json.loads((out / "checkpoints" / "step-8" / "state.json").read_text())
    assert (state["images"], state["data"]["position"]) == (64, 88)
    monkeypatch.undo()
    assert main([*tiny, f"out={tmp_path / 'calm'}", "steps=8", "save.every=2"]) == 0
    assert losses(tmp_path / "calm")[:4] == losses(out)[:4]
    assert losses(tmp_path / "calm")[4:] != losses(out)[4:]  # other images


def test_probes_of_steps_that_are_taken_again_count_once(tiny: list[str], tmp_path: Path, monkeypatch) -> None:
    """The first is the best, patience begins after step 2, and the probe of step 3 is made again."""
    poison(monkeypatch, range(2, 4))
    values = iter([0.5, *[0.4] * 9])
    monkeypatch.setattr("pretrain.probe._Judged.__call__", lambda *_: {"probe/linear": next(values)})
    out = tmp_path / "run"
    early = ["probe.every=1", "probe.early_stop=4"]
    assert main([*tiny, f"out={out}", "steps=20", "save.every=2", "guard.patience=2", *early]) == 0
    assert lines(out)[-1]["step"] == 6


def test_the_second_time_it_stops_with_a_diagnosis(tiny: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    poison(monkeypatch, range(4, 99))
    out = tmp_path / "run"
    assert main([*tiny, f"out={out}", "steps=20", "save.every=4", "guard.patience=3", "log.every=1"]) == 3
    told = capsys.readouterr().err
    for word in ("optim.lr", "skipped.jsonl", "not finite", "step-"):
        assert word in told
    assert (out / "checkpoints").is_dir()  # nothing done is lost


def test_features_that_are_not_finite_stop_it_alike(tiny: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    """Nothing of a log point may fail on them, or the run would end before it could go back."""
    inside, calls = Backbone.see, []

    def see(self, crops):
        calls.append(1)
        tokens = inside(self, crops)
        return [replace(one, cls=one.cls * math.nan) for one in tokens] if len(calls) > 8 else tokens

    monkeypatch.setattr(Backbone, "see", see)
    out = tmp_path / "run"
    assert main([*tiny, f"out={out}", "steps=20", "save.every=2", "guard.patience=2"]) == 3
    assert "not finite" in capsys.readouterr().err
    assert math.isnan(lines(out)[-1]["loss"])  # no loss of a line without a step is not a loss of zero


def test_a_bound_that_every_step_breaks_stops_before_the_first_checkpoint(
    tiny: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    poison(monkeypatch, range(99))
    assert main([*tiny, f"out={tmp_path / 'run'}", "steps=20", "save.every=10", "guard.patience=2"]) == 3
    assert "the start" in capsys.readouterr().err


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
