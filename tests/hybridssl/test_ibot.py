from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightly.loss import IBOTPatchLoss
from safetensors.torch import load_file, save_file

from hybridssl.backbone import BackboneOptions
from hybridssl.backbone import build as build_backbone
from hybridssl.errors import UserError
from hybridssl.masks import draw_mask
from hybridssl.objectives import build, dino
from hybridssl.objectives.ibot import Ibot, Options
from hybridssl.student import Student, make_teacher, update_teacher
from hybridssl.types import Views, ViewTokens
from tests.hybridssl.dense import sinkhorn

TINY = BackboneOptions(
    name="vit_tiny_patch16_224", args={"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}, registers=3
)


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


def shared(toys, **changes):
    """A student and a teacher whose ibot uses dino's head, one on its own, and the same with two heads."""
    small = {**toys.SMALL, **changes}
    return toys.pair({"ibot": Options(**small, head="dino"), "dino": dino.Options(**small)})


def test_a_shared_head_gets_both_gradients_and_gives_the_losses_of_two_alike(toys) -> None:
    student, teacher = shared(toys)
    views, taught, batch = toys.tokens(6, 1), toys.tokens(6, 2), toys.batch(6)
    apart = toys.pair({"ibot": Options(**toys.SMALL), "dino": dino.Options(**toys.SMALL)})
    for one, other in zip(apart, (student, teacher), strict=True):
        for name in ("ibot", "dino"):
            one[name].head.load_state_dict(other["dino"].head.state_dict())
    got = toys.step(student, teacher, [views], [taught], [batch])
    expected = toys.step(*apart, [toys.tokens(6, 1)], [taught], [batch])
    torch.testing.assert_close(got, expected)
    for name, gradient in toys.gradients(student).items():
        two = toys.gradients(apart[0])
        torch.testing.assert_close(gradient, two[name] + two[name.replace("dino", "ibot")])


def test_a_shared_head_is_one_set_of_parameters_everywhere(toys, tmp_path) -> None:
    student, teacher = shared(toys, freeze_last=0.5)
    assert all(name.startswith("dino.head.") for name in student.state_dict())
    assert len(list(student.parameters())) == len(list(student["dino"].head.parameters()))
    assert student["ibot"].head is student["dino"].head
    assert [id(p) for p in student["ibot"].frozen(0.1)] == [id(student["dino"].head.prototypes)]
    assert teacher["ibot"].head is not student["ibot"].head
    copied = copy.deepcopy(student)
    assert copied["ibot"].head is copied["dino"].head
    assert copied["ibot"].head is not student["ibot"].head
    save_file(student.state_dict(), tmp_path / "one.safetensors")  # refuses a tensor that is there twice
    teacher.load_state_dict(load_file(tmp_path / "one.safetensors"))
    x = torch.randn(3, toys.DIM)
    torch.testing.assert_close(teacher["ibot"].head(x), student["ibot"].head(x))


def test_the_teacher_of_a_shared_head_follows_it(toys) -> None:
    options = {"ibot": Options(**toys.SMALL, head="dino"), "dino": dino.Options(**toys.SMALL)}
    learner = Student(build_backbone(TINY, 3, 32), build(options, toys.context(dim=32)))
    teacher = make_teacher(learner)
    before = teacher.each()["ibot"].head.prototypes.clone()
    with torch.no_grad():
        learner.each()["dino"].head.prototypes.add_(1.0)
    update_teacher(teacher, learner, 0.75)
    torch.testing.assert_close(teacher.each()["ibot"].head.prototypes.detach(), before + 0.25)


def test_a_late_objective_begins_nothing_anew_in_a_shared_head(toys) -> None:
    late = {**toys.SMALL, "freeze_last": 0.1, "temperature_warmup": 0.2}
    options = {"ibot": Options(**late, head="dino", start=0.5), "dino": dino.Options(**late)}
    ibot = build(options, toys.context())["ibot"]
    assert list(ibot.frozen(0.5)) == []
    assert ibot.temperature(0.5) == 0.07


@pytest.mark.parametrize("centering", ["sinkhorn", "mean"])
def test_micro_batches_equal_one_large_batch_with_a_shared_head(centering: str, toys) -> None:
    student, teacher = shared(toys, centering=centering)
    whole, whole_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    batch, views, taught = toys.batch(12), toys.tokens(12, 1), toys.tokens(12, 2)
    expected = toys.step(whole, whole_teacher, [views], [taught], [batch])
    parts = (toys.split_tokens(views, 12, 3), toys.split_tokens(taught, 12, 3), toys.split_batch(batch, 3))
    torch.testing.assert_close(toys.step(student, teacher, *parts), expected)
    torch.testing.assert_close(toys.gradients(student), toys.gradients(whole))
    torch.testing.assert_close(dict(teacher.named_buffers()), dict(whole_teacher.named_buffers()))


def test_a_head_that_cannot_be_shared_is_named(toys) -> None:
    alone = Options(**toys.SMALL, head="dino")
    with pytest.raises(UserError, match=r"objectives\.ibot\.head=dino.*no dino"):
        build({"ibot": alone}, toys.context())
    other = dino.Options(**{**toys.SMALL, "prototypes": 9})
    with pytest.raises(UserError, match=r"objectives\.ibot\.prototypes=7 .*objectives\.dino\.prototypes=9"):
        build({"ibot": alone, "dino": other}, toys.context())
    late = dino.Options(**toys.SMALL, start=0.5)
    with pytest.raises(UserError, match=r"rests until objectives\.dino\.start=0\.5"):
        build({"ibot": alone, "dino": late}, toys.context())


@pytest.mark.parametrize("shape", ["block", "random", "inverse_block"])
def test_masks_of_every_shape_hide_patches_and_not_registers(shape: str, toys) -> None:
    """Through a backbone with registers: what hidden patches show does not matter, what the others show does."""
    torch.manual_seed(0)
    learner = Student(build_backbone(TINY, 3, 32), build({"ibot": Options(**toys.SMALL)}, toys.context(dim=32))).eval()
    teacher = make_teacher(learner)
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(np.stack([draw_mask(rng, (4, 4), count, shape) for count in (5, 12)]))  # [2B, P]
    images, batch = torch.randn(2, 3, 32, 32), replace(toys.batch(1), masks=masks.unflatten(0, (2, 1)))
    (target,) = teacher.each()["ibot"].targets([ViewTokens(teacher.backbone(images))], [batch], 1.0)
    assert target.patches.z.shape[1] == masks.sum() == 17

    def loss_of(pixels: torch.Tensor) -> torch.Tensor:
        tokens = learner.look(Views(pixels), masks)
        assert tokens.global_.registers.shape == (2, 3, 32)
        return learner.each()["ibot"](tokens, target, batch, 1.0)["ibot"]

    hidden = masks.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = torch.randn_like(images)
    torch.testing.assert_close(loss_of(images + noise * hidden), loss_of(images))
    assert not torch.isclose(loss_of(images + noise * ~hidden), loss_of(images), rtol=1e-6)
