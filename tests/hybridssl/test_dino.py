from __future__ import annotations

import math

import pytest
import torch
from lightly.loss import DINOLoss

from hybridssl.assign import sinkhorn
from hybridssl.objectives.dino import Dino, Options


def make(toys, **changes) -> tuple[Dino, Dino]:
    student, teacher = toys.pair({"dino": Options(**{**toys.SMALL, **changes})})
    return student["dino"], teacher["dino"]


@pytest.mark.parametrize("local", [0, 1, 3])
def test_equals_the_naive_loop_of_the_paper(local: int, toys) -> None:
    """DINOv2: [sum of 2L local-teacher terms + 2 x mean of the two cross-view terms] / (2L + 2)."""
    images, temperature = 4, 0.1
    student, teacher = make(toys)
    views, taught, batch = toys.tokens(images, 1, local), toys.tokens(images, 2), toys.batch(images)
    (target,) = teacher.targets([taught], [batch], progress=1.0)
    got = student(views, target, batch, 1.0)["dino"].item()

    t = sinkhorn(teacher.head(taught.global_.cls), 0.07).double()  # rows: view * images + image, both views in one call
    s = (student.head(views.global_.cls) / temperature).double().softmax(1).log()
    crops = [s[:images], s[images:]]
    if local:
        small = (student.head(views.local.cls) / temperature).double().softmax(1).log()
        crops += [small[i * images : (i + 1) * images] for i in range(local)]

    def term(teacher_view: int, crop: int) -> float:
        total = 0.0
        for i in range(images):
            for k in range(7):
                total -= t[teacher_view * images + i, k].item() * crops[crop][i, k].item()
        return total / images

    locals_ = sum(term(v, 2 + c) for v in (0, 1) for c in range(local))
    cross = (term(0, 1) + term(1, 0)) / 2
    assert got == pytest.approx((locals_ + 2 * cross) / (2 * local + 2), rel=1e-5)


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
    assert [p.shape for p in parts] == [(2, 2, 7)] * 3
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_the_temperature_warms_up(toys) -> None:
    objective, _ = make(toys, teacher_temperature_start=0.04, teacher_temperature=0.08, temperature_warmup=0.5)
    assert [objective.temperature(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.04, 0.06, 0.08, 0.08])
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
    scores = student.head(views.global_.cls).detach()
    best = torch.nn.functional.one_hot(scores.argmax(1), 7).float().unflatten(0, (2, 5))
    # The teacher says of each view what the student says of the other one.
    found = student.health(views, best.flip(0), batch)
    assert found["agreement"].item() == 1
    assert found["target_entropy"].item() == 0
    assert found["max_entropy"].item() == pytest.approx(math.log(7))
    assert found["prototype_usage"].item() == pytest.approx(len(scores[5:].argmax(1).unique()) / 5)
    assert all(not v.requires_grad for v in found.values())
    assert student.health(views, best, batch)["agreement"].item() < 1
