"""The anchors: what they hold, to what, and where the earlier backbone lives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridssl.backbone import BackboneOptions, build
from hybridssl.objectives import Context, options_types
from hybridssl.objectives import build as build_objectives
from hybridssl.student import Student, make_teacher, targets, update_teacher
from hybridssl.types import Batch, Tokens, Views, ViewTokens

TINY = BackboneOptions(
    name="vit_tiny_patch16_224", args={"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8}, registers=1
)
IMAGES, STEPS = 4, 10


def pair(**options: dict[str, Any]) -> tuple[Student, Student]:
    torch.manual_seed(0)
    made = {name: options_types()[name](**values) for name, values in options.items()}
    context = Context(dim=16, classes=0, named=torch.zeros(1, 0, dtype=torch.bool), steps=STEPS)
    learner = Student(build(TINY, 3, 32), build_objectives(made, context)).eval()
    return learner, make_teacher(learner)


def move(module: torch.nn.Module, seed: int = 1) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))


def views(images: int = IMAGES) -> Views:
    return Views(torch.randn(2 * images, 3, 32, 32, generator=torch.Generator().manual_seed(2)))


def batch(images: int = IMAGES) -> Batch:
    pixels, masks = torch.zeros(2, images, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, images, 16, dtype=torch.bool)
    none = torch.zeros(images, dtype=torch.int64)
    return Batch(pixels, pixels[:0], pixels[0, :0], none, masks, none[:, None][:, :0], none, none.bool())


def losses(learner: Student, teacher: Student, seen: Views, step: int = 0) -> dict[str, Tensor]:
    (target,) = targets(teacher, [seen], [batch()], step / STEPS)
    return learner(seen, target, batch(), step / STEPS)[0]


# --------------------------------------------------------------------------------------- where the earlier backbone is


@pytest.mark.parametrize("name", ["anchor", "gram"])
def test_the_earlier_backbone_is_the_teachers_alone_saved_once_and_follows_nobody(name: str) -> None:
    learner, teacher = pair(**{name: {}})
    start = {key: value.clone() for key, value in learner.backbone.state_dict().items()}
    assert not any("reference" in key for key in learner.state_dict())
    kept = f"objectives.{name}.reference."
    assert {key.removeprefix(kept) for key in teacher.state_dict() if key.startswith("objectives")} == start.keys()
    move(learner)
    update_teacher(teacher, learner, 0.5)
    assert all(torch.equal(teacher.state_dict()[kept + key], value) for key, value in start.items())
    moved = [key for key, value in start.items() if not torch.equal(teacher.backbone.state_dict()[key], value)]
    assert set(moved) == start.keys() - {"mask_token"}  # which rests, for nothing here hides a patch
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_resumed_run_finds_the_reference_it_had() -> None:
    learner, teacher = pair(anchor={}, gram={"start": 0.3})
    move(learner)
    update_teacher(teacher, learner, 0.0)
    targets(teacher, [views()], [batch()], 3 / STEPS)  # gram takes its first reference here
    move(teacher.backbone, seed=5)
    _, resumed = pair(anchor={}, gram={"start": 0.3})
    resumed.load_state_dict(teacher.state_dict())
    for name in ("anchor", "gram"):
        one, two = (targets(t, [views()], [batch()], 4 / STEPS)[0][name] for t in (teacher, resumed))
        assert torch.equal(torch.cat([x.flatten() for x in flat(one)]), torch.cat([x.flatten() for x in flat(two)]))


def flat(target: Tokens | Tensor) -> list[Tensor]:
    return [target] if isinstance(target, Tensor) else [target.cls, target.patches]


# ------------------------------------------------------------------------------------------------------ the two losses


def test_anchor_is_nothing_at_the_start_and_then_the_naive_cosine_distance() -> None:
    learner, teacher = pair(anchor={})
    seen = views()
    before = learner.backbone(seen.global_)
    assert all(value.abs() < 1e-6 for value in losses(learner, teacher, seen).values())
    move(learner)
    got = losses(learner, teacher, seen, step=7)
    after = learner.backbone(seen.global_)

    def distance(a: Tensor, b: Tensor) -> float:
        rows = list(zip(a.detach().flatten(0, -2).double(), b.detach().flatten(0, -2).double(), strict=True))
        return sum(1 - float(x @ y / (x.norm() * y.norm())) for x, y in rows) / len(rows)

    assert got.keys() == {"anchor/cls", "anchor/patches"}
    assert got["anchor/cls"].item() == pytest.approx(distance(after.cls, before.cls), rel=1e-4)
    assert got["anchor/patches"].item() == pytest.approx(distance(after.patches, before.patches), rel=1e-4)
    assert got["anchor/cls"] > 0.01


def test_gram_is_the_naive_mean_over_pairs_of_patches() -> None:
    learner, teacher = pair(gram={})
    seen = views()
    before = learner.backbone(seen.global_).patches.detach().double()
    move(learner)
    after = learner.backbone(seen.global_).patches.detach().double()
    expected, pairs = 0.0, 0
    for a, b in zip(after, before, strict=True):
        for i in range(16):
            for j in range(16):
                ours, theirs = (float(x[i] @ x[j] / (x[i].norm() * x[j].norm())) for x in (a, b))
                expected, pairs = expected + (ours - theirs) ** 2, pairs + 1
    assert losses(learner, teacher, seen)["gram"].item() == pytest.approx(expected / pairs, rel=1e-4)


def test_gram_lets_features_turn_together_where_anchor_does_not() -> None:
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))[0]
    there = Tokens(torch.randn(4, 16), torch.zeros(4, 0, 16), torch.randn(4, 9, 16))
    turned = ViewTokens(Tokens(there.cls @ turn, there.registers, there.patches @ turn))
    learner, _ = pair(anchor={}, gram={})
    gram = learner.objectives["gram"](turned, F.normalize(there.patches, dim=-1), batch(2), 0.0)
    assert gram["gram"] < 1e-10
    assert learner.objectives["anchor"](turned, there, batch(2), 0.0)["patches"] > 0.5


def test_gram_starts_and_refreshes_on_its_schedule() -> None:
    learner, teacher = pair(anchor={}, gram={"start": 0.3, "refresh": 0.2})  # of ten steps: 3, 5, 7, 9
    taken = []
    teacher.objectives["gram"].refresh = lambda: taken.append(step)  # type: ignore[method-assign]
    for step in range(STEPS):
        assert ("gram" in losses(learner, teacher, views(), step)) == (step >= 3)
    assert taken == [3, 5, 7, 9]
    once, never_again = pair(gram={}), []
    once[1].objectives["gram"].refresh = lambda: never_again.append(step)  # type: ignore[method-assign]
    for step in range(STEPS):
        losses(*once, views(), step)
    assert never_again == [0]


def test_a_refresh_takes_the_teacher_of_that_moment() -> None:
    learner, teacher = pair(gram={"refresh": 0.5})
    move(learner)
    update_teacher(teacher, learner, 0.0)
    assert losses(learner, teacher, views(), step=4)["gram"] > 1e-4
    assert losses(learner, teacher, views(), step=5)["gram"] < 1e-10  # the teacher is the student


def test_the_doubled_reference_keeps_every_patch_in_its_place() -> None:
    """A view whose left half is dark and whose right half is bright, on a backbone that sees brightness only."""
    teacher = pair(gram={"double": True})[1]
    embed = torch.ones(16) * torch.arange(1, 17)

    class Brightness(torch.nn.Module):
        def forward(self, images: Tensor) -> Tokens:
            mean = F.avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1)[..., None]  # [N, P, 1]
            patches = torch.cat([mean * embed, torch.ones_like(mean).expand(-1, -1, 16)], dim=-1)
            return Tokens(patches[:, 0], patches[:, :0], patches)

    teacher.objectives["gram"].reference = Brightness()
    image = torch.zeros(2, 3, 32, 32)
    image[..., 16:] = 1.0
    found = teacher.objectives["gram"]._patches(image)
    plain = F.normalize(Brightness()(image).patches, dim=-1)
    assert found.shape == plain.shape == (2, 16, 32)
    left = torch.arange(16) % 4 < 2
    outer = torch.arange(16) % 4 % 3 == 0  # away from the edge, which enlarging blurs
    assert torch.allclose(found[:, outer], plain[:, outer], atol=0.05)
    assert (found[:, left] @ found[:, ~left].mT).max() < (found[:, left] @ found[:, left].mT).min()


@pytest.mark.parametrize("options", [{"anchor": {}}, {"gram": {}}, {"gram": {"double": True}}])
def test_micro_batches_equal_one_batch(options: dict) -> None:
    learner, teacher = pair(**options)
    move(learner)
    seen = views()
    whole = losses(learner, teacher, seen)
    halves = [Views(part) for part in seen.global_.unflatten(0, (2, -1)).chunk(2, dim=1)]
    halves = [Views(v.global_.flatten(0, 1)) for v in halves]
    parts = targets(teacher, halves, [batch(2)] * 2, 0.0)
    each = [learner(view, target, batch(2), 0.0)[0] for view, target in zip(halves, parts, strict=True)]
    for name, loss in whole.items():
        torch.testing.assert_close(torch.stack([part[name] for part in each]).mean(), loss)


@pytest.mark.parametrize("options", [{"anchor": {}}, {"gram": {}}])
def test_half_precision_comes_close_and_losses_stay_float32(options: dict) -> None:
    learner, teacher = pair(**options)
    move(learner)
    exact = losses(learner, teacher, views())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses(learner, teacher, views())
    assert all(loss.dtype == torch.float32 for loss in rounded.values())
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.01)


def test_shares_beyond_the_run_are_named() -> None:
    with pytest.raises(ValueError, match=r"refresh=1\.5 must be a share"):
        pair(gram={"refresh": 1.5})
