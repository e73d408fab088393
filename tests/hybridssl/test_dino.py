from __future__ import annotations

import math

import pytest
import torch
from lightly.loss import DINOLoss

from hybridssl.fused import Targets
from hybridssl.objectives import spread
from hybridssl.objectives.dino import Dino, Options
from tests.hybridssl.dense import sinkhorn


def make(toys, **changes) -> tuple[Dino, Dino]:
    student, teacher = toys.pair({"dino": Options(**{**toys.SMALL, **changes})})
    return student["dino"], teacher["dino"]


def pair_terms(teacher, student, taught, views, local: int) -> dict[tuple[int, int], float]:
    """Cross-entropy of teacher view v (0, 1) with student crop c (0, 1: global; from 2 on: local), by triple loops."""
    t = sinkhorn(teacher.head(taught.global_.cls), 0.07).double()  # rows: view * images + image, both views in one call
    images = len(t) // 2
    rows = torch.cat([views.global_.cls, views.local.cls]) if local else views.global_.cls
    s = (student.head(rows) / 0.1).double().softmax(1).log()
    terms = {}
    for v in (0, 1):
        for c in range(2 + local):
            loss = 0.0
            for i in range(images):
                loss -= sum(t[v * images + i, k].item() * s[c * images + i, k].item() for k in range(7))
            terms[v, c] = loss / images
    return terms


@pytest.mark.parametrize("local", [0, 1, 3])
def test_equals_the_naive_loops_of_the_three_papers(local: int, toys) -> None:
    weight = (1.0, 0.5)
    student, teacher = make(toys, local_weight=weight)
    views, taught, batch = toys.tokens(4, 1, local), toys.tokens(4, 2), toys.batch(4)
    (target,) = teacher.targets([taught], [batch], progress=1.0)  # the teacher's temperature is at its end
    terms = pair_terms(teacher, student, taught, views, local)
    cross = (terms[0, 1] + terms[1, 0]) / 2
    smalls = [terms[v, 2 + c] for v in (0, 1) for c in range(local)]
    mean_small = sum(smalls) / max(len(smalls), 1)

    pairs = [loss for (v, c), loss in terms.items() if v != c]
    v1 = sum(pairs) / len(pairs)
    v2 = (2 * local * mean_small + 2 * cross) / (2 * local + 2)
    assert student(views, target, batch, 0.0)["dino"].item() == pytest.approx(v1, rel=1e-5)
    assert v1 == pytest.approx(v2)
    for progress, w in ((0.5, 0.75), (1.0, 0.5)):
        v3 = w * mean_small * (2 * local / (2 * local + 2)) + cross * (2 / (2 * local + 2))
        assert student(views, target, batch, progress)["dino"].item() == pytest.approx(v3, rel=1e-5)
        assert student.schedules(progress)["local_weight"] == pytest.approx(w)


@pytest.mark.parametrize("local", [0, 3])
def test_equals_lightly_over_two_steps_of_the_centre(local: int, toys) -> None:
    student, teacher = make(toys, centering="mean", centre_momentum=0.8)
    theirs = DINOLoss(7, teacher_temp=0.07, student_temp=0.1, center_momentum=0.8)
    for seed in (1, 2):
        views, taught, batch = toys.tokens(4, seed, local), toys.tokens(4, seed + 10), toys.batch(4)
        (target,) = teacher.targets([taught], [batch], progress=1.0)
        crops = list(student.head(views.global_.cls).chunk(2))
        crops += list(student.head(views.local.cls).chunk(local)) if local else []
        expected = theirs(list(teacher.head(taught.global_.cls).chunk(2)), crops, teacher_temp=0.07)
        torch.testing.assert_close(student(views, target, batch, 1.0)["dino"], expected)
        torch.testing.assert_close(teacher.centre.value, theirs.center[0, 0])
        assert student.centre.value.eq(0).all()  # the teacher's own


def test_targets_keep_images_and_views_in_their_place(toys) -> None:
    _, teacher = make(toys)
    batch, taught = toys.batch(6), toys.tokens(6, 2)
    parts = teacher.targets(toys.split_tokens(taught, 6, 3), toys.split_batch(batch, 3), 1.0)
    whole = sinkhorn(teacher.head(taught.global_.cls), 0.07).unflatten(0, (2, 6))
    dense = [part.dense() for part in parts]
    assert [p.shape for p in dense] == [(2, 2, 7)] * 3
    torch.testing.assert_close(torch.cat(dense, dim=1), whole)


def test_the_temperature_warms_up(toys) -> None:
    objective, _ = make(toys, teacher_temperature_start=0.04, teacher_temperature=0.08, temperature_warmup=0.5)
    assert [objective.temperature(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.04, 0.06, 0.08, 0.08])
    late = toys.pair({"dino": Options(**toys.SMALL, start=0.6, temperature_warmup=0.2), "spread": spread.Options()})[0]
    assert [late["dino"].temperature(p) for p in (0.0, 0.6, 0.7, 0.8, 1.0)] == pytest.approx(
        [0.04, 0.04, 0.055, 0.07, 0.07]
    )
    at_once, _ = make(toys, temperature_warmup=0.0)
    assert at_once.temperature(0.0) == 0.07


def test_starts_near_ln_k(toys) -> None:
    torch.manual_seed(0)
    student, teacher = (Dino(Options(prototypes=64, hidden=32), toys.context()) for _ in range(2))
    batch = toys.batch(64)
    (target,) = teacher.targets([toys.tokens(64, 2)], [batch], 1.0)
    assert student(toys.tokens(64, 1), target, batch, 1.0)["dino"].item() == pytest.approx(math.log(64), rel=0.25)


def test_health_of_a_student_that_agrees_across_views(toys) -> None:
    student, _ = make(toys)
    views, batch = toys.tokens(5, 1), toys.batch(5)
    z = student.head.bottleneck(views.global_.cls).detach().unflatten(0, (2, 5))
    weight = student.head.weight.detach()
    # The teacher says of each view, and without a doubt, what the student says of the other one.
    found = student.health(views, Targets(z.flip(0), weight, 1e-6, torch.zeros(1, 7)), batch)
    assert found["agreement"].item() == 1
    assert found["target_entropy"].item() == pytest.approx(0, abs=1e-6)
    assert found["max_entropy"].item() == pytest.approx(math.log(7))
    assert found["prototype_usage"].item() == pytest.approx(len((z[1] @ weight.T).argmax(1).unique()) / 5)
    assert all(not v.requires_grad for v in found.values())
    assert student.health(views, Targets(z, weight, 1e-6, torch.zeros(1, 7)), batch)["agreement"].item() < 1
