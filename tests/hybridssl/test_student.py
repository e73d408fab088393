from __future__ import annotations

import copy

import pytest
import torch

from hybridssl.backbone import BackboneOptions, build
from hybridssl.objectives import Context, options_types
from hybridssl.objectives import build as build_objectives
from hybridssl.student import Student, make_teacher, targets, update_teacher
from hybridssl.types import Batch, Views

TINY = BackboneOptions(
    name="vit_tiny_patch16_224", args={"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}, drop_path=0.5
)
SMALL = {"prototypes": 8, "hidden": 16, "bottleneck": 8}


def student(*names: str) -> Student:
    torch.manual_seed(0)
    options = {n: options_types()[n](**(SMALL if n in ("dino", "ibot") else {})) for n in names}
    context = Context(dim=32, classes=3, named=torch.ones(1, 3, dtype=torch.bool))
    return Student(build(TINY, 3, 32), build_objectives(options, context))


def views(images: int = 2) -> Views:
    g = torch.Generator().manual_seed(1)
    return Views(*(torch.randn(n * images, 3, s, s, generator=g) for n, s in ((2, 32), (3, 16), (1, 32))))


@pytest.mark.parametrize(("refused", "kept"), [(None, 0.75), (0.0, 0.75), (1.0, 1.0)])
def test_the_teacher_is_the_moving_average_of_the_student(refused: float | None, kept: float) -> None:
    """With a step that was judged, as the loop makes it, and without; of a refused one nothing is taken over."""
    learner = student("dino", "ibot", "labels")
    teacher = make_teacher(learner)
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    with torch.no_grad():
        for p in learner.parameters():
            p.add_(torch.randn_like(p))
    update_teacher(teacher, learner, 0.75, None if refused is None else torch.tensor(refused))
    now = dict(learner.named_parameters())
    for name, p in teacher.named_parameters():
        assert torch.allclose(p, kept * before[name] + (1 - kept) * now[name], atol=1e-6), name
        assert not p.requires_grad


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.75, 0.996, 0.9999, 1.0])
def test_the_average_is_exact_judged_or_not_and_refused_is_untouched(momentum: float) -> None:
    """torch's interpolation says what is right: a weight in which both agree stays, and momentum 0 is the student."""
    learner = student("dino", "ibot")
    with torch.no_grad():
        for p in learner.parameters():
            p.copy_(torch.randn(p.shape))
    start = make_teacher(learner)
    with torch.no_grad():
        for p in list(learner.parameters())[::2]:  # the others rest
            p.copy_(torch.randn(p.shape))
    now = dict(learner.named_parameters())
    found = {refused: copy.deepcopy(start) for refused in (None, 0.0, 1.0)}
    for refused, teacher in found.items():
        update_teacher(teacher, learner, momentum, None if refused is None else torch.tensor(refused))
    for name, was in start.named_parameters():
        unjudged, taken, left = (teacher.get_parameter(name) for teacher in found.values())
        assert torch.equal(taken, unjudged), name
        torch.testing.assert_close(taken, was.lerp(now[name], 1 - momentum), rtol=1e-6, atol=1e-6)
        assert torch.equal(left, was), name
        if torch.equal(was, now[name]) or momentum == 0:
            assert torch.equal(taken, now[name]), name


def test_the_teacher_drops_no_path_and_hides_with_its_own_token() -> None:
    learner = student("dino", "ibot")
    teacher = make_teacher(learner)
    images, mask = torch.randn(16, 3, 32, 32), torch.ones(16, 16, dtype=torch.bool)
    assert torch.equal(teacher.backbone(images).cls, teacher.backbone(images).cls)
    assert not torch.equal(learner.backbone(images).cls, learner.backbone(images).cls)  # drop path .5
    before = teacher.backbone(images, mask).patches
    with torch.no_grad():
        learner.backbone.mask_token.add_(1.0)
    assert torch.equal(before, teacher.backbone(images, mask).patches)


def test_views_that_no_objective_uses_are_not_computed() -> None:
    masks = torch.zeros(4, 16, dtype=torch.bool)
    labels_only = student("labels").eval().look(views(), masks)
    assert (len(labels_only.global_.cls), labels_only.local, len(labels_only.clean.cls)) == (0, None, 2)
    all_of_them = student("dino", "labels").eval().look(views(), masks)
    assert (len(all_of_them.global_.cls), len(all_of_them.local.cls), len(all_of_them.clean.cls)) == (4, 6, 2)
    assert torch.allclose(all_of_them.clean.cls, labels_only.clean.cls, atol=1e-5)  # the same pass, the same numbers


def test_a_batch_without_a_view_to_look_at_still_reaches_the_backbone() -> None:
    """Labels alone, and no image of the micro-batch has one: zero gradients, or other processes wait for them."""
    learner = student("labels")
    tokens = learner.look(Views(views().global_, None, None), torch.zeros(4, 16, dtype=torch.bool))
    assert (len(tokens.global_.cls), len(tokens.clean.cls)) == (0, 0)
    tokens.clean.cls.sum().backward()
    gradients = [p.grad for p in learner.backbone.parameters() if p.requires_grad]
    assert all(g is not None and g.eq(0).all() for g in gradients)


def test_a_micro_batch_without_a_label_has_no_rank_and_a_loss_of_zero() -> None:
    """At a log point, where labels alone are trained on."""
    learner, seen = student("labels"), Views(views().global_, None, None)
    nothing = torch.zeros(2, 3, dtype=torch.uint8)
    batch = Batch(
        *(torch.zeros(0) for _ in range(4)),
        masks=torch.zeros(2, 2, 16, dtype=torch.bool),
        labels=nothing,
        source=torch.zeros(2, dtype=torch.long),
        labelled=torch.zeros(2, dtype=torch.bool),
        clean_of=torch.zeros(0, dtype=torch.long),
    )
    (target,) = targets(make_teacher(learner), [seen], [batch], 0.5)
    losses, health = learner(seen, target, batch, 0.5, watch=True)
    assert losses["labels"] == 0
    assert health["health/rankme"].isnan()


def test_the_mask_token_trains_only_where_patches_are_hidden() -> None:
    assert student("dino", "ibot").backbone.mask_token.requires_grad
    assert not student("dino", "labels").backbone.mask_token.requires_grad
