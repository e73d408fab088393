"""That benchmarks/step.py times what it says: every contestant that is installed takes a step that trains."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import step
from benchmarks.contestants import Setting
from tests.benchmarks import dinov2_package

SETTING = Setting("vit_tiny_patch16_224", 32, 1, 2, 64, 32, 2, batch=4, prototypes=64)
CPU = torch.device("cpu")


def test_a_race_reports_ratios_to_the_floor() -> None:
    found = step.race(SETTING, list(step.CONTESTANTS), 2, CPU)
    assert found["contestants"]["floor"] == {"over_floor": 1.0, "quartiles": [1.0, 1.0]}
    assert {"ours", "lightly's parts"} <= found["contestants"].keys()
    assert all(entry["over_floor"] > 1 for name, entry in found["contestants"].items() if name != "floor")
    assert set(found["contestants"]) | set(found["not installed"]) == set(step.CONTESTANTS)


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
    assert "clone facebookresearch/dinov2" in found["not installed"]["DINOv2"]
    assert "left out: dinov2 is not installed" in capsys.readouterr().out


def test_heads_are_judged_on_one_result() -> None:
    """Both are the same loss: a step of each from the same numbers leaves the same gradients."""
    ours, plain = (step.make_heads(name, 48, 96, CPU)() for name in ("ours", "plain"))
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-7)
