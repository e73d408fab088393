"""The arithmetic of a step that runs compared with one another cannot see: both would be wrong alike."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from hybridssl import student
from pretrain.command import load
from pretrain.loop import main, step_seed, weighted
from tests.pretrain.conftest import TINY, lines


def test_the_loss_is_the_sum_of_all_parts_by_weight_and_ramp() -> None:
    weights = ["objectives.dino.weight=2", "objectives.spread.weight=0.5", "objectives.labels.weight=3"]
    ramps = ["objectives.dino.ramp=0", "objectives.spread.ramp=0.5", "objectives.labels.ramp=0.1"]
    recipe = load([*TINY, "data.train=d", "out=o", *weights, *ramps])
    parts = {"dino": 3.0, "spread": 5.0, "labels": 7.0, "labels/pseudo": 11.0}
    losses = {name: torch.tensor(value) for name, value in parts.items()}
    assert weighted(losses, recipe, 0.2).item() == pytest.approx(2 * 3 + 0.5 * 0.4 * 5 + 3 * (7 + 11))


def test_gradients_are_clipped_and_the_teacher_gets_its_momentum(tiny: list[str], tmp_path: Path, monkeypatch) -> None:
    clip, update = Accelerator.clip_grad_norm_, student.update_teacher
    kept: list[float] = []
    momenta: list[float] = []

    def clipped(self, parameters, *rest):
        parameters = list(parameters)
        norm = clip(self, parameters, *rest)
        kept.append(float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()))
        return norm

    def updated(teacher, learner, momentum, refused):
        momenta.append(momentum)
        update(teacher, learner, momentum, refused)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clipped)
    monkeypatch.setattr(student, "update_teacher", updated)
    arguments = [*tiny, "optim.clip=0.01", "teacher.momentum=[0.5, 0.9]", f"out={tmp_path / 'run'}"]
    assert main(arguments) == 0
    assert kept == pytest.approx([0.01] * 4, rel=1e-3)
    assert all(line["grad_norm"] > 0.1 for line in lines(tmp_path / "run"))  # as it was before
    assert momenta == pytest.approx([0.5, 0.5 + 0.4 * (1 - 0.5**0.5) / 2, 0.7, 0.5 + 0.4 * (1 + 0.5**0.5) / 2])


def test_the_backbone_rests_while_the_heads_warm_up(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main([*tiny, "optim.heads_first=0.5", "save.every=1", "save.keep=9", f"out={out}"]) == 0
    after = [load_file(out / "checkpoints" / f"step-{n}" / "model.safetensors") for n in (1, 2, 4)]
    moved = [{k for k in a if k.startswith("student.") and not torch.equal(a[k], b[k])} for a, b in pairwise(after)]
    resting, awake = ({k for k in keys if k.startswith("student.backbone.")} for keys in moved)
    assert moved[0]
    assert not resting
    assert len(awake) > 10


def test_every_step_and_process_draws_its_own() -> None:
    seeds = {step_seed(seed, step, rank) for seed, step, rank in product(range(3), range(3), range(3))}
    assert len(seeds) == 27
