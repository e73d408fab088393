"""However a step is run, it is the same step: in micro-batches, in half precision, with next to nothing to learn from.

Every objective in each of its ways (arms.py), through a real backbone. Several processes are in test_dist.py.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridssl import student
from hybridssl.student import Student
from hybridssl.types import Batch, Views
from tests.hybridssl import arms

ARMS = arms.arms()
IMAGES = 8
PSEUDO = [name for name in ARMS if name.startswith("labels pseudo")]  # these learn from what has no label
each_arm = pytest.mark.parametrize("name", ARMS)


def alone(name: str, **changes) -> tuple[Student, Student]:
    """Student and teacher with this arm, and its companion if it has one."""
    learner = arms.learner({name: ARMS[name]}, **changes)
    return learner, arms.taught(learner)


def some(name: str, images: int = IMAGES, **changes) -> tuple[Views, Batch]:
    return arms.data(images, even=arms.of_visible_patches(ARMS[name]), **changes)


def gradients(learner: Student) -> dict[str, Tensor]:
    """Of every parameter that asks for one: DDP would wait for one that is missing."""
    asking = {name: p.grad for name, p in learner.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in asking.items() if gradient is None]
    assert not missing
    return {name: gradient for name, gradient in asking.items() if gradient is not None}


def test_every_objective_is_among_the_arms() -> None:
    found = {arm.objective for arm in ARMS.values()}
    assert {"dino", "ibot", "pixels", "spread", "labels", "anchor"} <= found == arms.objective_types().keys()
    assert {"pixels style=mae", "ibot head=dino", "labels kind=multi", "spread estimator=kde"} <= ARMS.keys()


@each_arm
def test_micro_batches_equal_one_large_batch(name: str) -> None:
    """Labels, masks and reports are so dealt out that counts differ, and some micro-batches have none."""
    with arms.float64():
        learner, teacher = alone(name)
        views, batch = some(name)
        runs = []
        for parts, above in ((1, teacher), (4, copy.deepcopy(teacher))):
            learner.zero_grad()
            losses = arms.losses(learner, above, arms.parts(views, batch, parts))
            runs.append((losses, gradients(learner), dict(above.named_buffers())))
    assert all(runs[0][0].values())  # a part that is zero would prove nothing
    for whole, micro in zip(*runs, strict=True):
        torch.testing.assert_close(micro, whole, rtol=1e-6, atol=1e-8)


@each_arm
def test_gradients_reach_every_weight_and_say_by_how_much_a_step_lowers_the_loss(name: str) -> None:
    """What is cut off the graph by mistake fails here, whatever the formula."""
    with arms.float64():
        learner, teacher = alone(name)
        views, batch = some(name)
        (target,) = student.targets(teacher, [views], [batch], 0.5)

        def loss() -> Tensor:
            return torch.stack(list(learner(views, target, batch, 0.5)[0].values())).sum()

        before = loss()
        before.backward()
        assert [n for n, gradient in gradients(learner).items() if "bias" not in n and not gradient.any()] == []
        squares = sum(gradient.square().sum() for gradient in gradients(learner).values())
        with torch.no_grad():
            for parameter in learner.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-5 * parameter.grad / squares
            change = (loss() - before) / 1e-5
    assert change == pytest.approx(-1, abs=0.1 if name == "guide" else 0.01)  # which reverses one of three, weakly
    assert all(parameter.grad is None for parameter in teacher.parameters())


@each_arm
def test_autocast_rounds_heads_and_no_loss(name: str) -> None:
    learner, teacher = alone(name)
    views, batch = some(name)
    objective = learner.each()[name]
    (target,) = student.targets(teacher, [views], [batch], 0.5)
    tokens = learner.look(views, batch.masks.flatten(0, 1))
    exact = objective(tokens, target[name], batch, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = objective(tokens, target[name], batch, 0.5)
    assert all(loss.dtype == torch.float32 for loss in rounded.values())
    heads = name.startswith("pixels") or any(
        isinstance(module, nn.Sequential) for module in learner.objectives.modules()
    )
    torch.testing.assert_close(rounded, exact, rtol=0.02 if heads else 1e-6, atol=0.01 if heads else 1e-6)


@pytest.mark.parametrize("name", [name for name in ARMS if name.split()[0] in ("dino", "ibot", "swav")])
def test_assignment_sees_all_micro_batches_of_a_step(name: str) -> None:
    """What the teacher asks of one micro-batch depends on which others there are."""
    _, teacher = alone(name)
    micro = arms.parts(*some(name), 4)

    def first(number: int) -> Tensor:
        views, batches = zip(*micro[:number], strict=True)
        target = student.targets(copy.deepcopy(teacher), views, batches, 0.5)[0][name]
        return (target.patches if hasattr(target, "patches") else target).dense()

    if "centering=mean" in name:  # as it was before this step, so the others count from the next one on
        torch.testing.assert_close(first(1), first(4))
    else:
        assert (first(1) - first(4)).abs().max() > 0.01


def with_labels(batch: Batch, number: int) -> Batch:
    known = torch.arange(len(batch)) < number
    return replace(batch, labels=batch.labels * known[:, None], labelled=known, clean_of=known.nonzero()[:, 0])


@each_arm
@pytest.mark.parametrize("classes", [5, 1])
def test_batches_with_next_to_nothing_in_them_are_finite(name: str, classes: int) -> None:
    learner, teacher = alone(name, classes=classes)
    views, batch = some(name, labelled=1.0)
    batch = replace(batch, labels=batch.labels[:, :classes].clamp_min(int(classes == 1)))
    nothing = replace(batch, text=[], meta=torch.full_like(batch.meta, torch.nan))
    cases = {
        "no label": (views, with_labels(batch, 0)),
        "one label": (views, with_labels(batch, 1)),
        "all labels": (views, batch),
        "one image": arms.part(views, batch, slice(0, 1)),
        "one image without a label": arms.part(views, with_labels(batch, 0), slice(0, 1)),
        "no mask, report or value": (views, replace(nothing, masks=batch.masks & False)),
    }
    if classes == 1:
        cases = {case: cases[case] for case in ("no label", "all labels", "one image")}
    for case, (seen, one) in cases.items():
        seen = replace(seen, clean=seen.clean[: len(one.clean_of)] if len(one.clean_of) else None)
        learner.zero_grad()
        losses = arms.losses(learner, teacher, [(seen, one)])
        assert all(loss.isfinite() for loss in losses.values()), case
        assert all(gradient.isfinite().all() for gradient in gradients(learner).values()), case


COUNTED = ("ibot", "pixels", "labels", "guide", "text_pairs")  # divided by how many have what is learnt from


@pytest.mark.parametrize("name", [n for n in ARMS if n.split()[0] in COUNTED and n not in ("ibot head=dino", *PSEUDO)])
def test_nothing_to_learn_from_is_an_exact_zero_on_the_graph(name: str) -> None:
    learner, teacher = alone(name)
    views, batch = some(name, labelled=0.0)
    empty = replace(batch, masks=batch.masks & False, text=[], meta=torch.full_like(batch.meta, torch.nan))
    losses = arms.losses(learner, teacher, [(views, empty)])
    assert losses
    assert not any(losses.values())
    assert not any(gradient.any() for gradient in gradients(learner).values())


@each_arm
def test_half_precision_is_finite_and_close(name: str) -> None:
    """bf16 keeps 8 bits: losses within some percent, gradients in the same direction."""
    learner, teacher = alone(name)
    micro = arms.parts(*some(name), 2)
    exact = arms.losses(learner, copy.deepcopy(teacher), micro)
    wanted = torch.cat([g.flatten() for g in gradients(learner).values()])
    learner.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = arms.losses(learner, teacher, micro)
    got = torch.cat([g.flatten() for g in gradients(learner).values()])
    assert all(loss.dtype == torch.float32 for loss in rounded.values())
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.01)
    assert F.cosine_similarity(got, wanted, dim=0) > 0.995  # NaN is not
