"""Between log points the host never waits for the device. Shown without one: see waiting.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hybridssl import backbone, optim, student
from hybridssl.backbone import BackboneOptions
from hybridssl.colour import NEVER
from hybridssl.student import Student
from hybridssl.tower import TextTower
from hybridssl.types import Batch, Views, sent
from hybridssl.view_options import ViewOptions
from hybridssl.views import render
from pretrain.guard import Guard, GuardOptions, Unchanged
from tests.hybridssl import arms
from tests.hybridssl.waiting import META, Waits, nowhere_to_wait

ARMS = arms.arms()
REFUSED = (Waits, NotImplementedError, RuntimeError, TypeError)
WAIT = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: 1 if x.any() else 0,
    "int": lambda x: int(x[0, 0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "a mask": lambda x: x[x > 0],
    "filling a mask": lambda x: x.__setitem__(x[:, 0] > 0, x[:1]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.repeat_interleave(x[:, 0].long(), 0),
    "a list": lambda x: x[[0, 1]],
    "a tensor of numbers": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor(1.0),
    "to": lambda x: torch.ones(3).to(x.device),
    "copy_": lambda x: x[0].copy_(torch.ones(3)),
    "places on the host": lambda x: x[torch.ones(3, dtype=torch.long)],
}
FREE = {
    "sent": lambda x: sent(torch.ones(3), x.device),
    "copy_": lambda x: x[0].copy_(torch.ones(3), non_blocking=True),
    "new_full": lambda x: x.new_full((2,), 3.0),
    "one value where a mask is": lambda x: x.__setitem__(x > 0, 1.0),
    "a choice": lambda x: torch.where(x > 0, x, 1.0),
    "places on the device": lambda x: x[x[:, 0].long()],
    "a number of the host": lambda x: x * 2.0 + torch.tensor(1.0),
}


@pytest.mark.parametrize("how", WAIT)
def test_what_waits_is_refused(how: str) -> None:
    with nowhere_to_wait(), pytest.raises(REFUSED):
        WAIT[how](torch.zeros(4, 3, device=META))


@pytest.mark.parametrize("how", FREE)
def test_what_does_not_wait_is_not(how: str) -> None:
    with nowhere_to_wait():
        FREE[how](torch.zeros(4, 3, device=META))


def a_step(learner: Student, teacher: Student, data: tuple[Views, Batch], spike: float = 12.0) -> None:
    """All that the loop computes between two log points, but for the optimiser's one kernel (see below)."""
    learner, teacher = learner.to(META), teacher.to(META)
    views = Views(*(view.to(META) for view in (data[0].global_, data[0].local, data[0].clean)))
    guard = Guard(GuardOptions(spike=spike), META)
    with nowhere_to_wait():
        unchanged = Unchanged(learner, teacher)
        losses = arms.losses(learner, teacher, [(views, data[1].to(META))])
        norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), 3.0)
        refused = guard.judge(1, torch.stack(list(losses.values())).sum(), norm, 0, [])
        student.update_teacher(teacher, learner, 0.99, refused)
        unchanged.keep(refused)


@pytest.mark.parametrize("name", ARMS)
def test_no_objective_waits(name: str) -> None:
    learner = arms.learner({name: ARMS[name]})
    a_step(learner, arms.taught(learner), arms.data(4, even=arms.of_visible_patches(ARMS[name])))


@pytest.mark.parametrize("drop_path", [0.05, 0.3])
@pytest.mark.parametrize("packed", [True, False])
def test_no_way_of_running_a_transformer_waits(drop_path: float, packed: bool) -> None:
    learner = arms.learner({"dino": ARMS["dino"], "ibot": ARMS["ibot"]})
    options = BackboneOptions(name="vit_tiny_patch16_224", args=arms.ROOM, registers=2, drop_path=drop_path)
    learner = Student(backbone.build(options, 3, arms.SIDE), learner.objectives)
    learner.backbone.packed = packed
    a_step(learner, student.make_teacher(learner), arms.data(4), spike=0)


def test_a_convolutional_network_does_not_wait() -> None:
    learner = arms.learner({"dino": ARMS["dino"]})
    network = backbone.build(BackboneOptions(name="resnet10t"), 3, arms.SIDE)
    learner.objectives["dino"].head.mlp[0] = torch.nn.Linear(network.dim, 16)
    learner = Student(network, learner.objectives)
    a_step(learner, student.make_teacher(learner), arms.data(4), spike=0)


@pytest.mark.parametrize("how", ["frozen", "trained"])
def test_an_encoder_of_reports_does_not_wait(how: str, toys) -> None:
    tower = TextTower(toys.tiny_encoder(), "auto", how, 12)  # type: ignore[arg-type]
    moving = {name: value.to(META).requires_grad_() for name, value in tower.start.items()}
    tower.model, tower.device = tower.model.to(META), META  # once, and then it stays there
    with nowhere_to_wait():
        found = tower(["left lung", "no opacity"], moving, META)  # equally long, so that none is padded
        if how == "trained":
            found.sum().backward()


def test_views_are_rendered_without_waiting() -> None:
    _, batch = arms.data(4)
    numbers = torch.zeros(4, 4, 14)  # two global and two local views of four images
    numbers[0, ::2, -1], numbers[..., -2], numbers[1, 1, -2] = 1.0, NEVER, 0.5  # some are blurred, one is inverted
    crops = (torch.zeros(2, 4, 3, side, side, dtype=torch.uint8) for side in (32, 16))
    whole = replace(batch, colour=numbers, clean=torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    whole = replace(whole, **dict(zip(("global_", "local"), crops, strict=True)))
    with nowhere_to_wait():
        views = render(whole.to(META), ViewOptions())
    assert views.local is not None
    assert views.local.shape == (8, 3, 16, 16)


def test_the_optimiser_asks_nothing() -> None:
    """It is one kernel, which reads on the device whether the step is refused; there is none for the meta device."""
    learner = arms.learner({"dino": ARMS["dino"]})
    optimizer = optim.build(learner.backbone, learner.objectives, optim.OptimOptions())
    asked: list[str] = []

    class Notes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for parameter in learner.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):
        optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
        with Notes():
            optimizer.step()
    assert "_fused_adamw_" in asked
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"} & set(asked)


def test_what_the_host_must_know_of_masks_comes_with_the_batch() -> None:
    for even, unmasked in ((True, 7), (False, None)):
        _, batch = arms.data(4, even=even)
        there = batch.to("cpu")
        assert there.unmasked == unmasked
        assert torch.equal(there.hidden, batch.masks.flatten().nonzero()[:, 0])
