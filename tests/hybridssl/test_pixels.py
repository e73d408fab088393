from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightly.models.modules import MaskedVisionTransformerTIMM
from lightly.models.utils import get_at_index, patchify

from hybridssl.backbone import Backbone, BackboneOptions
from hybridssl.backbone import build as build_backbone
from hybridssl.errors import UserError
from hybridssl.masks import draw_mask
from hybridssl.objectives import build, options_types
from hybridssl.objectives.pixels import Options
from hybridssl.student import Student, make_teacher, update_teacher
from hybridssl.types import Batch, Views, ViewTokens

PATCH, SIDE, GRID = 8, 32, (4, 4)
ARGS = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": PATCH}
TINY = BackboneOptions(name="vit_tiny_patch16_224", args=ARGS, registers=3)
STYLES = ("simmim", "mae")


def options(style: str, **changes) -> Options:
    return Options(style=style, width=32, depth=1, **changes)


def learner(
    toys, style: str, more: tuple[str, ...] = (), backbone: BackboneOptions = TINY, side: int = SIDE
) -> Student:
    torch.manual_seed(0)
    wanted = {"pixels": options(style)} | {name: options_types()[name](**toys.SMALL) for name in more}
    context = toys.context(dim=32, patch=PATCH, patches=(side // PATCH) ** 2)
    student = Student(build_backbone(backbone, 3, SIDE), build(wanted, context)).eval()
    for module in (student.each()["pixels"].predict, student.backbone):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return student


def data(toys, images: int, counts: tuple[int, ...], shape: str = "random", side: int = SIDE) -> tuple[Views, Batch]:
    """Rendered global views, and masks that hide counts[0] patches of the first row, and so on in turn."""
    torch.manual_seed(1)
    rng, grid = np.random.default_rng(1), (side // PATCH, side // PATCH)
    masks = [draw_mask(rng, grid, counts[row % len(counts)], shape) for row in range(2 * images)]
    batch = replace(toys.batch(images), masks=torch.from_numpy(np.stack(masks)).unflatten(0, (2, images)))
    return Views(torch.randn(2 * images, 3, side, side) * 2 + 1), batch


def run(student: Student, views: Views, batch: Batch) -> torch.Tensor:
    (target,) = student.each()["pixels"].targets([], [batch], 0.5)
    return student(views, {"pixels": target}, batch, 0.5)[0]["pixels"]


def naive(student: Student, views: Views, batch: Batch, predicted: torch.Tensor) -> float:
    """The papers' losses, a pixel at a time. predicted [M, pixels], of the hidden patches view by view."""
    power = 2 if student.each()["pixels"].decoder is not None else 1
    rows = [(v, p) for v, mask in enumerate(batch.masks.flatten(0, 1)) for p in range(len(mask)) if mask[p]]
    total = 0.0
    for (v, p), guess in zip(rows, predicted.double().tolist(), strict=True):
        y, x = PATCH * (p // GRID[1]), PATCH * (p % GRID[1])
        patch = views.global_[v, :, y : y + PATCH, x : x + PATCH].double().permute(1, 2, 0).flatten().tolist()
        mean = sum(patch) / len(patch)
        variance = sum((value - mean) ** 2 for value in patch) / (len(patch) - 1)  # as in MAE's code
        errors = [abs((t - mean) / (variance + 1e-6) ** 0.5 - y) for t, y in zip(patch, guess, strict=True)]
        total += sum(e**power for e in errors) / len(errors)
    return total / len(rows)


def test_simmim_equals_the_naive_loop_of_the_paper(toys) -> None:
    student = learner(toys, "simmim")
    views, batch = data(toys, 2, (4, 9, 0))  # one view has no mask
    masks = batch.masks.flatten(0, 1)
    tokens = student.backbone(views.global_, masks)  # hidden places hold the mask token
    predicted = student.each()["pixels"].predict(tokens.patches[masks])
    assert run(student, views, batch).item() == pytest.approx(naive(student, views, batch, predicted), rel=1e-5)


def test_mae_equals_the_naive_loop_of_the_paper(toys) -> None:
    student = learner(toys, "mae")
    objective, decoder = student.each()["pixels"], student.each()["pixels"].decoder
    views, batch = data(toys, 2, (12,))
    rows = []
    for image, mask in zip(views.global_, batch.masks.flatten(0, 1), strict=True):  # one view at a time, in full
        seen = student.backbone.visible(image[None], mask[None])
        tokens = decoder.embed(torch.cat([seen.cls[:, None], seen.patches], dim=1))[0]
        sequence, places = [tokens[0]], iter(tokens[1:])
        sequence += [decoder.blocks.mask_token[0, 0] if hidden else next(places) for hidden in mask]
        decoded = decoder.blocks.decode(torch.stack(sequence)[None] + decoder.blocks.pos_embed)[0, 1:]
        rows += [objective.predict(decoded[p]) for p in range(len(mask)) if mask[p]]
    expected = naive(student, views, batch, torch.stack(rows).detach())
    assert run(student, views, batch).item() == pytest.approx(expected, rel=1e-5)


def test_mae_equals_lightly(toys) -> None:
    """Their encoder around our backbone's weights, their indices, and the loss as their example computes it."""
    student = learner(toys, "mae")
    objective = student.each()["pixels"]
    views, batch = data(toys, 3, (12,))
    masks = batch.masks.flatten(0, 1)
    keep = (~masks).nonzero()[:, 1].view(6, -1) + 4  # behind the class token and three registers
    hide = masks.nonzero()[:, 1].view(6, -1)
    theirs = MaskedVisionTransformerTIMM(
        vit=copy.deepcopy(student.backbone.model), weight_initialization="skip", pos_embed_initialization="skip"
    )
    prefix = torch.arange(4).expand(6, 4)
    encoded = theirs.encode(views.global_, idx_keep=torch.cat([prefix, keep], dim=1))
    ours = student.backbone.visible(views.global_, masks)
    torch.testing.assert_close(torch.cat([ours.cls[:, None], ours.registers, ours.patches], dim=1), encoded)

    width = objective.decoder.embed.out_features
    x = objective.decoder.embed(torch.cat([encoded[:, :1], encoded[:, 4:]], dim=1))
    full = objective.decoder.blocks.mask_token.expand(6, 17, width).clone()
    full[:, 0] = x[:, 0]
    full.scatter_(1, (keep - 3)[..., None].expand(-1, -1, width), x[:, 1:])
    predicted = objective.predict(get_at_index(objective.decoder.blocks(full), hide + 1))
    wanted = get_at_index(patchify(views.global_, PATCH), hide)
    wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(run(student, views, batch), torch.nn.MSELoss()(predicted, wanted))


@pytest.mark.parametrize("style", STYLES)
def test_micro_batches_equal_one_large_batch(style: str, toys) -> None:
    counts = (12,) if style == "mae" else (3, 12, 0, 7, 1)
    views, batch = data(toys, 6, counts)
    whole, student = learner(toys, style), learner(toys, style)
    expected = run(whole, views, batch)
    expected.backward()

    parts = toys.split_batch(batch, 3)
    images = views.global_.unflatten(0, (2, 6)).chunk(3, dim=1)
    if style == "simmim":
        assert len({int(part.masks.sum()) for part in parts}) > 1  # or a plain mean would do
    targets = student.each()["pixels"].targets([], parts, 0.5)
    got = torch.zeros(())
    for crops, part, target in zip(images, parts, targets, strict=True):
        loss = student(Views(crops.flatten(0, 1)), {"pixels": target}, part, 0.5)[0]["pixels"] / 3
        loss.backward()
        got = got + loss.detach()
    torch.testing.assert_close(got, expected.detach())
    torch.testing.assert_close(toys.gradients(student), toys.gradients(whole))


@pytest.mark.parametrize("style", STYLES)
def test_the_loss_looks_at_hidden_patches_and_the_encoder_at_visible_ones(style: str, toys) -> None:
    student = learner(toys, style)
    views, batch = data(toys, 1, (12,))
    masks = batch.masks.flatten(0, 1)
    hidden = masks.view(2, 1, *GRID).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    changed = torch.where(hidden, torch.randn_like(views.global_), views.global_)
    one, other = student.look(views, masks), student.look(Views(changed), masks)
    field = "visible" if style == "mae" else "global_"
    torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=0, atol=0)
    assert run(student, views, batch) != run(student, Views(changed), batch)
    # Brightness and contrast of a whole patch are taken out of the target.
    brighter = torch.where(hidden, 3 * views.global_ + 1, views.global_)
    torch.testing.assert_close(run(student, Views(brighter), batch), run(student, views, batch), rtol=1e-4, atol=0)


@pytest.mark.parametrize("style", STYLES)
def test_gradients_reach_everything_that_trains_and_zero_is_on_the_graph(style: str, toys) -> None:
    student = learner(toys, style)
    for counts, moves in (((12,), True), ((0,), False)):
        views, batch = data(toys, 2, counts)
        loss = run(student, views, batch)
        loss.backward()
        assert (loss.item() == 0) is not moves
        found = toys.gradients(student)
        assert found.keys() == {n for n, p in student.named_parameters() if p.requires_grad}  # DDP would wait
        assert any(g.abs().sum() > 0 for n, g in found.items() if n.startswith("backbone")) is moves
        assert ("backbone.mask_token" in found) is (style == "simmim")
        student.zero_grad()


@pytest.mark.parametrize("style", STYLES)
def test_a_fresh_head_starts_at_the_size_of_the_target(style: str, toys) -> None:
    context = toys.context(dim=32, patch=PATCH, patches=16)
    student = Student(build_backbone(TINY, 3, SIDE), build({"pixels": options(style)}, context)).eval()
    views, batch = data(toys, 4, (12,))
    assert run(student, views, batch).item() == pytest.approx({"mae": 1.0, "simmim": 0.8}[style], abs=0.1)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_base_patch14_reg4_dinov2"])
def test_visible_tokens_are_those_of_an_encoder_whose_attention_skips_the_others(name: str) -> None:
    """Every family's positions: learned, rotary, without one for the prefix; another image size than the layout's."""
    args = {**ARGS} | ({"init_values": 0.1} if "dinov3" not in name else {})
    backbone = build_backbone(BackboneOptions(name=name, args=args), 3, SIDE).eval()
    torch.manual_seed(0)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images, mask = (
        torch.randn(2, 3, 48, 48),
        torch.from_numpy(draw_mask(np.random.default_rng(0), (6, 6), 27, "random")),
    )
    masks = torch.stack([mask, mask.flip(0)])
    got = backbone.visible(images, masks)
    assert got.patches.shape == (2, 9, 32)
    prefix = backbone.prefix
    allowed = torch.cat([torch.ones(2, prefix, dtype=torch.bool), ~masks], dim=1)[:, None, None]  # [N, 1, 1, T]
    whole = backbone.model.forward_features(images, attn_mask=allowed.expand(-1, -1, prefix + 36, -1))
    torch.testing.assert_close(got.cls, whole[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.registers, whole[:, 1:prefix], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.patches.flatten(0, 1), whole[:, prefix:][~masks], rtol=1e-4, atol=1e-5)
    assert backbone(images).patches.shape == (2, 36, 32)  # a mask does not outlive its call


def test_unequal_masks_and_odd_widths_are_refused(toys) -> None:
    student = learner(toys, "mae")
    with pytest.raises(UserError, match=r"views\.mask_probability=1 .*views\.mask_ratio"):
        run(student, *data(toys, 2, (12, 11)))
    with pytest.raises(UserError, match=r"objectives\.pixels\.width=40 .* 32"):
        build({"pixels": replace(options("mae"), width=40)}, toys.context())


def test_a_network_without_patches_is_refused(toys) -> None:
    network = build_backbone(BackboneOptions(name="resnet18"), 3, 64)
    with pytest.raises(UserError, match=r"objectives\.pixels"):
        Student(network, build({"pixels": options("mae")}, toys.context(dim=network.dim)))


def test_mae_beside_dino_leaves_dinos_views_whole_and_the_teacher_follows(toys) -> None:
    student = learner(toys, "mae", more=("dino",))
    views, batch = data(toys, 2, (12,))
    tokens = student.look(views, batch.masks.flatten(0, 1))
    torch.testing.assert_close(tokens.global_.cls, student.backbone(views.global_).cls)
    assert tokens.visible.patches.shape == (4, 4, 32)
    teacher = make_teacher(student)
    assert isinstance(teacher.backbone, Backbone)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:  # mae hides nothing behind a mask token: that one rests in both
                parameter.add_(1.0)
    old = teacher.backbone.visible(views.global_, batch.masks.flatten(0, 1)).cls
    torch.testing.assert_close(old, tokens.visible.cls)  # the copy drops patches by its own hook and weights
    update_teacher(teacher, student, 0.0)
    torch.testing.assert_close(dict(teacher.named_parameters()), dict(student.named_parameters()))


@pytest.mark.parametrize("style", STYLES)
def test_autocast_keeps_the_loss_in_float32(style: str, toys) -> None:
    student = learner(toys, style)
    views, batch = data(toys, 2, (12,))
    exact = run(student, views, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run(student, views, batch)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_watching_needs_no_whole_view(toys) -> None:
    student = learner(toys, "mae")
    views, batch = data(toys, 2, (12,))
    (target,) = student.each()["pixels"].targets([ViewTokens(student.backbone(views.global_))], [batch], 0.5)
    _, health = student(views, {"pixels": target}, batch, 0.5, watch=True)
    assert health["health/rankme"] > 1
