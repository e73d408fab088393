"""Convolutional backbones: tokens, loading, what they refuse, and batch norm in the student and the teacher."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn

from hybridssl import cnn, optim
from hybridssl.backbone import Backbone, BackboneOptions, Crops, build, load_weights
from hybridssl.cnn import follow_statistics
from hybridssl.errors import UserError
from hybridssl.objectives import Context, options_types
from hybridssl.objectives import build as build_objectives
from hybridssl.optim import OptimOptions
from hybridssl.student import Student, make_teacher, targets, update_teacher
from hybridssl.types import Batch, Views

DENSENET = BackboneOptions(name="densenet121", args={"growth_rate": 4, "block_config": (1, 1, 1, 1)})
RESNET = BackboneOptions(name="resnet50", args={"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8)})
CONVNEXT = BackboneOptions(name="convnext_atto", args={"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)})
ALL = [DENSENET, RESNET, CONVNEXT]
HEAD = {"prototypes": 8, "hidden": 16, "bottleneck": 8}
SMALL = {"dino": HEAD, "ibot": HEAD, "swav": HEAD, "contrast": {"hidden": 16, "bottleneck": 8}}


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


def student(*names: str, options: BackboneOptions = DENSENET) -> Student:
    torch.manual_seed(0)
    backbone = build(options, 1, 64)
    chosen = {n: options_types()[n](**SMALL.get(n, {})) for n in names}
    return Student(backbone, build_objectives(chosen, Context(backbone.dim, 3, torch.ones(1, 3).bool())))


def views(images: int = 4, seed: int = 1) -> Views:
    g = torch.Generator().manual_seed(seed)
    return Views(*(torch.randn(n * images, 1, s, s, generator=g) for n, s in ((2, 64), (3, 32), (1, 64))))


def batch(images: int = 4) -> Batch:
    labels = torch.eye(3, dtype=torch.uint8)[torch.arange(images) % 3]
    nothing = torch.zeros(2, images, 0, dtype=torch.uint8)
    masks = torch.ones(2, images, 4, dtype=torch.bool)  # the loader draws them for every backbone
    known = torch.ones(images, dtype=torch.bool)
    return Batch(nothing, nothing, nothing[0], nothing, masks, labels, torch.zeros(images, dtype=torch.int64), known)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if "running" in n}


@pytest.mark.parametrize("options", ALL, ids=lambda o: o.name)
def test_tokens_are_the_pooled_map_and_its_cells(options: BackboneOptions) -> None:
    backbone = build(options, 1, 64).eval()
    images = torch.randn(2, 1, 64, 96)
    tokens = backbone(images)
    assert tokens.cls.shape == (2, backbone.dim)
    assert tokens.registers.shape == (2, 0, backbone.dim)
    assert tokens.patches.shape == (2, 2 * 3, backbone.dim)  # the stride is 32
    torch.testing.assert_close(tokens.cls, backbone.model(images))  # what timm itself calls the image's feature
    cells = backbone.model.forward_features(images)  # [2, D, 2, 3]
    torch.testing.assert_close(tokens.patches[:, 3 * 1 + 2], cells[:, :, 1, 2])  # row by row
    if options is not CONVNEXT:  # which normalises after pooling
        torch.testing.assert_close(tokens.patches.mean(1), tokens.cls)


@pytest.mark.parametrize("options", ALL, ids=lambda o: o.name)
def test_a_step_of_training_moves_every_parameter_and_lowers_the_loss(options: BackboneOptions) -> None:
    learner = student("dino", "labels", "spread", "contrast", "swav", options=options)
    teacher = make_teacher(learner)
    optimizer = optim.build(learner.backbone, learner.objectives, OptimOptions(layer_decay=0.9))
    optim.set_hyperparameters(optimizer, OptimOptions(lr=1e-3, warmup=0.0), 1024, 0.0)
    target = targets(teacher, [views()], [batch()], 0.5)[0]
    totals = []
    for _ in range(2):
        losses, health = learner(views(), target, batch(), 0.5, watch=True)
        totals.append(sum(losses.values()))
        optimizer.zero_grad()
        totals[-1].backward()
        assert [n for n, p in learner.named_parameters() if p.grad is None] == []  # DDP would wait for it
        optimizer.step()
    assert totals[1] < totals[0]
    assert health["health/rankme"] > 1


def test_objectives_that_hide_patches_are_refused_with_a_remedy() -> None:
    with pytest.raises(UserError, match=r"objectives\.ibot.*densenet121.*objectives\.ibot=null.*vit_small") as caught:
        student("dino", "ibot")
    assert "objectives.dino" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot hide"):
        build(DENSENET, 1, 64)(torch.zeros(1, 1, 64, 64), torch.ones(1, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "size", "words"),
    [
        (replace(DENSENET, registers=4), 64, ["registers=4", "densenet121"]),
        (replace(DENSENET, drop_path=0.1), 64, ["densenet121", "drop_path_rate"]),
        (replace(RESNET, args={"layerz": 3}), 64, ["layerz"]),
        (RESNET, 72, ["72", "stride 32"]),
        (BackboneOptions(name="densenet12"), 64, ["densenet12", "densenet121"]),
    ],
)
def test_what_cannot_be_built_is_named(options: BackboneOptions, size: int, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build(options, 3, size)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("options", ALL, ids=lambda o: o.name)
def test_colour_weights_serve_grey_images_and_the_classifier_is_left_out(options, tmp_path: Path) -> None:
    colour = build(options, 3, 64).eval()
    head = {f"{colour.model.pretrained_cfg['classifier']}.weight": torch.zeros(5, colour.dim)}
    save_file({**colour.model.state_dict(), **head}, tmp_path / "model.safetensors")
    grey = build(options, 1, 64)
    coverage = load_weights(grey, replace(options, weights=str(tmp_path)))
    assert (coverage.matched, coverage.unexpected) == (coverage.total, ())
    image = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(grey.eval()(image).cls, colour(image.expand(-1, 3, -1, -1)).cls, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- batch norm


@pytest.mark.parametrize("side", [128, 64])  # 64: while a curriculum halves all crops
def test_running_statistics_come_from_the_largest_views_alone(side: int) -> None:
    alone, beside = build(DENSENET, 1, 128), build(DENSENET, 1, 128)
    beside.load_state_dict(alone.state_dict())
    start = statistics(alone)
    full, local = Crops(torch.randn(4, 1, side, side)), torch.randn(4, 1, side // 2, side // 2) + 3
    alone.see([full])
    seen, fewer = (beside.see([full, Crops(some)])[1].cls for some in (local, local[:2]))
    assert not torch.equal(seen[:2], fewer)  # normalised by the crops in hand
    alone.see([full])
    torch.testing.assert_close(statistics(beside), statistics(alone), rtol=0, atol=0)
    assert not any(torch.equal(b, start[n]) for n, b in statistics(beside).items())


@torch.no_grad()
def test_the_teachers_statistics_follow_and_lead_to_the_students_features() -> None:
    """After many steps of a resting student, the teacher in eval mode sees what the student in eval mode sees."""
    learner = student("dino")
    teacher = make_teacher(learner)
    for seed in range(40):
        learner.backbone(views(seed=seed).global_)
        update_teacher(teacher, learner, 0.8)
    images = views().global_
    learner.eval()
    fresh = build(DENSENET, 1, 64).eval()
    fresh.load_state_dict({**learner.backbone.state_dict(), **statistics(fresh)})
    close = (teacher.backbone(images).cls - learner.backbone(images).cls).norm()
    assert close < 0.3 * (fresh(images).cls - learner.backbone(images).cls).norm()


def test_statistics_follow_as_a_mean_first_and_then_by_momentum() -> None:
    teacher, learner = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    expected = torch.zeros(2)
    for step in range(1, 8):
        learner.running_mean += torch.tensor([1.0, -step])
        share = max(1 / step, 0.25)
        expected = (1 - share) * expected + share * learner.running_mean
        follow_statistics(teacher, learner, 0.75)
        torch.testing.assert_close(teacher.running_mean, expected)
        if step == 1:
            assert torch.equal(teacher.running_mean, learner.running_mean)
    before = copy.deepcopy(teacher.state_dict())
    follow_statistics(nn.Linear(2, 2), nn.Linear(2, 2), 0.5)  # nothing to follow
    assert before.keys() == teacher.state_dict().keys()


def test_batch_norms_are_shared_over_gpus_with_their_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build(DENSENET, 1, 64).eval()
    images = torch.randn(2, 1, 64, 64)
    before = backbone(images).cls
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert cnn.synchronised(backbone, gpu) is backbone  # one process
    assert any(type(m) is BatchNormAct2d for m in backbone.modules())
    monkeypatch.setattr(cnn, "world_size", lambda: 2)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in cnn.synchronised(backbone, cpu).modules())
    shared = cnn.synchronised(backbone, gpu)
    assert isinstance(shared, Backbone)
    monkeypatch.undo()
    assert any(type(m) is SyncBatchNormAct for m in shared.modules())
    torch.testing.assert_close(shared.eval()(images).cls, before)
