from __future__ import annotations

import pytest
import torch
from lightly.loss import IBOTPatchLoss

from hybridssl.assign import sinkhorn
from hybridssl.objectives.ibot import Ibot, Options


def make(toys, **changes) -> tuple[Ibot, Ibot]:
    student, teacher = toys.pair({"ibot": Options(**{**toys.SMALL, **changes})})
    return student["ibot"], teacher["ibot"]


def test_equals_the_naive_loop_of_the_paper(toys) -> None:
    student, teacher = make(toys)
    views, taught, batch = toys.tokens(6, 1), toys.tokens(6, 2), toys.batch(6)
    (target,) = teacher.targets([taught], [batch], 1.0)
    got = student(views, target, batch, 1.0)["ibot"].item()

    places = [(v, i, p) for v in (0, 1) for i in range(6) for p in range(toys.PATCHES) if batch.masks[v, i, p]]
    seen = torch.stack([taught.global_.patches[v * 6 + i, p] for v, i, p in places])
    targets = sinkhorn(teacher.head(seen), 0.07).double()
    of_view: dict[tuple[int, int], list[float]] = {}
    for row, (v, i, p) in enumerate(places):
        scores = student.head(views.global_.patches[v * 6 + i, p][None])[0].double() / 0.1
        log_p = scores - scores.exp().sum().log()
        of_view.setdefault((v, i), []).append(-sum(targets[row, k].item() * log_p[k].item() for k in range(7)))
    assert 0 < len(of_view) < 12  # some views have no mask
    assert got == pytest.approx(sum(sum(x) / len(x) for x in of_view.values()) / len(of_view), rel=1e-5)


@pytest.mark.parametrize("masked", [0.5, 1.0])
def test_equals_lightly_up_to_the_share_of_masked_views(masked: float, toys) -> None:
    student, teacher = make(toys, centering="mean")
    theirs = IBOTPatchLoss(7, teacher_temp=0.07, student_temp=0.1)
    for seed in (1, 2):
        views, taught, batch = toys.tokens(6, seed), toys.tokens(6, seed + 10), toys.batch(6, seed, masked)
        (target,) = teacher.targets([taught], [batch], 1.0)
        mask = batch.masks.flatten(0, 1)
        rows = student.head(views.global_.patches[mask])
        expected = theirs(teacher.head(taught.global_.patches[mask]), rows, mask[:, None])  # lightly: [2B, H, W]
        share = mask.any(1).float().mean()  # lightly divides by all views
        assert (share == 1) == (masked == 1)
        torch.testing.assert_close(student(views, target, batch, 1.0)["ibot"] * share, expected)


def test_visible_patches_and_local_crops_play_no_part(toys) -> None:
    student, teacher = make(toys)
    views, batch = toys.tokens(4, 1), toys.batch(4)
    (target,) = teacher.targets([toys.tokens(4, 2)], [batch], 1.0)
    student(views, target, batch, 1.0)["ibot"].backward()
    moved = views.global_.patches.grad.abs().sum(dim=2) > 0
    assert torch.equal(moved, batch.masks.flatten(0, 1))
    assert views.local.patches.grad is None
    assert views.global_.cls.grad is None


def test_one_micro_batch_without_masks_leaves_the_others_right(toys) -> None:
    student, teacher = make(toys)
    views, taught = [toys.tokens(4, s) for s in (1, 2)], [toys.tokens(4, s) for s in (3, 4)]
    batches = [toys.batch(4), toys.batch(4, masked=0.0)]
    first, second = teacher.targets(taught, batches, 1.0)
    (alone,) = teacher.targets(taught[:1], batches[:1], 1.0)
    assert student(views[1], second, batches[1], 1.0)["ibot"].item() == 0
    both = student(views[0], first, batches[0], 1.0)["ibot"] / 2  # the mean over two micro-batches
    torch.testing.assert_close(both, student(views[0], alone, batches[0], 1.0)["ibot"])
