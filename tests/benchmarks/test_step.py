"""That benchmarks/step.py times what it says: every contestant that is installed takes a step that trains."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import contestants, step
from benchmarks.contestants import Setting
from hybridssl.errors import UserError
from tests.benchmarks import dinov2_package

SETTING = Setting("vit_tiny_patch16_224", 32, 1, 2, 64, 32, 2, batch=4, prototypes=64)
CPU = torch.device("cpu")


def test_a_race_reports_ratios_to_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of work done: by that of the wall a floor that has to wait for a core is sometimes the slowest."""
    work = FlopCounterMode(display=False)
    monkeypatch.setattr(step, "clock", lambda device: work.get_total_flops())
    with work:
        found = step.race(SETTING, list(step.CONTESTANTS), 2, CPU)
    assert found["contestants"]["floor"] == {"over_floor": 1.0, "quartiles": [1.0, 1.0]}
    assert {"ours", "lightly's parts"} <= found["contestants"].keys()
    assert all(entry["over_floor"] > 1 for name, entry in found["contestants"].items() if name != "floor")
    assert set(found["contestants"]) | set(found["left_out"]) == set(step.CONTESTANTS)


@pytest.mark.parametrize("name", ["ours", "lightly's parts"])
def test_a_contestant_moves_its_student_and_its_teacher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.nn.Module] = []
    build = step.CONTESTANTS[name].__globals__["backbone"]
    monkeypatch.setitem(step.CONTESTANTS[name].__globals__, "backbone", lambda s: made.append(build(s)) or made[0])
    once = step.CONTESTANTS[name](SETTING, CPU)
    before = [p.detach().clone() for p in made[0].parameters()]
    for _ in range(2):
        once()
    moved = [not torch.equal(a, b) for a, b in zip(before, made[0].parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved)


def test_dinov2s_own_step_trains_where_its_package_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = dinov2_package.install(monkeypatch)
    once = step.CONTESTANTS["DINOv2"](SETTING, CPU)
    before = [[p.detach().clone() for p in network.parameters()] for network in networks]
    assert len(networks) == 2
    torch.testing.assert_close(before[0], before[1])
    for _ in range(2):
        once()
    distances = [
        torch.stack([(new - old).norm() for new, old in zip(network.parameters(), was, strict=True)])
        for network, was in zip(networks, before, strict=True)
    ]
    student, teacher = distances
    assert (student > 0).all()
    assert (teacher > 0).float().mean() > 0.8
    assert (teacher < 0.02 * student).all()


def test_a_package_that_is_missing_is_left_out_with_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "dinov2", None)
    found = step.race(SETTING, ["floor", "DINOv2"], 1, CPU)
    assert found["contestants"].keys() == {"floor"}
    assert "clone facebookresearch/dinov2" in found["left_out"]["DINOv2"]
    assert "left out: DINOv2: ImportError: dinov2 is not installed" in capsys.readouterr().out


def failing(at: int):
    """A contestant whose step number `at` fails; 0: its making does."""
    calls = iter(range(at + 1))

    def fail_or_not() -> None:
        if next(calls) == at:
            raise AttributeError(f"call {at}")

    def build(setting: Setting, device: torch.device):
        fail_or_not()
        return fail_or_not

    return build


@pytest.mark.parametrize("at", [0, 1, 4, 7])
def test_one_that_fails_costs_the_others_nothing(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.CONTESTANTS, "DINOv2", failing(at))
    found = step.race(SETTING, ["floor", "DINOv2", "ours"], 3, CPU)
    assert found["contestants"].keys() == {"floor", "ours"}
    assert found["left_out"] == {"DINOv2": f"AttributeError: call {at}"}


def test_our_own_failure_ends_it_and_keeps_the_settings_before(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(step, "write_results", lambda name, document: written.append(len(document["settings"])))
    monkeypatch.setattr("sys.argv", ["step", "--size", "test", "--only", "ours", "--rounds", "1"])
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.setattr(step, "keep_freed_memory", lambda: None)  # which would hold for this process's other tests too
    broken = replace(SETTING, name="no such network")
    monkeypatch.setitem(step.SIZES, "test", [SETTING, SETTING, broken])
    with pytest.raises(UserError, match="no such network"):
        step.main()
    assert written == [1, 2]


def test_speed_is_told_as_work_and_share_of_the_peak() -> None:
    large = step.SIZES["gpu"][-1]  # 1,522 GFLOP an image (test_cost.py), and about 12 in the heads
    found = step.speed(large, "floor", 32 / 100, 989)
    assert found == {"images_per_s": 100, "tflops": pytest.approx(152, rel=0.05), "mfu": pytest.approx(0.154, rel=0.05)}
    with_heads = step.speed(large, "ours", 32 / 100, None)
    assert 0.5 < with_heads.pop("tflops") - found["tflops"] < 2
    assert with_heads == {"images_per_s": 100}


def test_our_step_is_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that must be refused leaves neither student nor teacher nor buffers changed, as in a run."""
    learners: list[torch.nn.Module] = []
    make = contestants.student.make_teacher
    monkeypatch.setattr(
        contestants.student, "make_teacher", lambda mine: learners.extend((mine, make(mine))) or learners[1]
    )
    once = contestants.ours(SETTING, CPU)
    before = [{k: v.clone() for k, v in one.state_dict().items()} for one in learners]
    monkeypatch.setattr(contestants.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    once()
    for one, was in zip(learners, before, strict=True):
        assert all(torch.equal(value, was[name]) for name, value in one.state_dict().items())
    monkeypatch.undo()
    once()
    for one, was in zip(learners, before, strict=True):
        assert not all(torch.equal(value, was[name]) for name, value in one.state_dict().items())


def test_heads_are_judged_on_one_result() -> None:
    """Both are the same loss: a step of each from the same numbers leaves the same gradients."""
    ours, plain = (step.make_heads(name, 48, 96, CPU)() for name in ("ours", "plain"))
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-7)
