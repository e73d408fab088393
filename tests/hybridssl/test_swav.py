from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import SwaVLoss

from hybridssl.objectives.swav import Options, Swav
from hybridssl.student import make_teacher, update_teacher
from tests.hybridssl.dense import sinkhorn
from tests.hybridssl.test_student import student as tiny_student


def make(toys, **changes) -> tuple[Swav, Swav]:
    student, teacher = toys.pair({"swav": Options(**{**toys.SMALL, **changes})})
    return student["swav"], teacher["swav"]


@pytest.mark.parametrize("local", [0, 3])
def test_equals_the_naive_loop_of_the_paper(local: int, toys) -> None:
    """Every crop v predicts the code of every global view i it is not: mean over these pairs and over images."""
    images = 4
    student, teacher = make(toys)
    views, taught, batch = toys.tokens(images, 1, local), toys.tokens(images, 2), toys.batch(images)
    (target,) = teacher.targets([taught], [batch], 0.5)
    got = student(views, target, batch, 0.5)["swav"].item()

    codes = [sinkhorn(teacher.head(view), 0.05).double() for view in taught.global_.cls.chunk(2)]  # view by view
    crops = list(views.global_.cls.chunk(2)) + (list(views.local.cls.chunk(local)) if local else [])
    terms = []
    for i, code in enumerate(codes):
        for v, crop in enumerate(crops):
            if v != i:
                log_p = (student.head(crop).double() / 0.1).softmax(1).log()
                terms.append(-sum((code[n, k] * log_p[n, k]).item() for n in range(images) for k in range(7)) / images)
    assert got == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize("local", [0, 3])
def test_equals_lightly_with_and_without_a_queue(local: int, toys) -> None:
    """Three batches of 4 with room for 6: the queue is used from the third on, and holds the newest first."""
    images, room = 4, 6
    _, objective = make(toys, queue=room)
    past: list[torch.Tensor] = []
    for seed in (1, 2, 3):
        views, batch = toys.tokens(images, seed, local), toys.batch(images)
        (target,) = objective.targets([views], [batch], 0.5)
        got = objective(views, target, batch, 0.5)["swav"]
        scores = [objective.head(view) for view in views.global_.cls.chunk(2)]
        small = [objective.head(view) for view in views.local.cls.chunk(local)] if local else []
        queue = torch.cat(past, dim=1)[:, :room] if seed == 3 else None
        queued = [objective.head.logits(rows) for rows in queue] if queue is not None else None
        torch.testing.assert_close(got, SwaVLoss()(scores, small, queued)[0], rtol=1e-4, atol=1e-5)
        newest = F.normalize(objective.head.mlp(views.global_.cls), dim=1).unflatten(0, (2, -1)).detach()
        past.insert(0, newest)
        assert bool(objective.queue[:, -1].any()) == (seed > 1)


def test_the_queue_changes_the_codes(toys) -> None:
    batch, views = toys.batch(4), toys.tokens(4, 1)
    _, teacher = make(toys, queue=5)
    (without,) = teacher.targets([views], [batch], 0.5)
    teacher.targets([views], [batch], 0.5)
    (balanced,) = teacher.targets([views], [batch], 0.5)
    assert not torch.allclose(without.dense(), balanced.dense(), atol=1e-3)
    assert balanced.dense().shape == (2, 4, 7)


def test_a_teacher_without_momentum_is_the_student_of_this_step() -> None:
    """What the docstring promises: with teacher.momentum=[0, 0] the codes come from the student itself."""
    learner = tiny_student("dino", "ibot").eval()
    teacher = make_teacher(learner)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(torch.randn_like(parameter))  # an optimiser's step
    update_teacher(teacher, learner, 0.0)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher.backbone(images).cls, learner.backbone(images).cls, rtol=0, atol=0)


def test_prototypes_rest_at_the_start(toys) -> None:
    objective, _ = make(toys, freeze_last=0.1)
    assert [id(p) for p in objective.frozen(0.05)] == [id(objective.head.prototypes)]
    assert list(objective.frozen(0.1)) == []
