from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch

from hybridssl import lora
from hybridssl.backbone import BackboneOptions, build
from hybridssl.errors import UserError
from hybridssl.objectives import Context, options_types
from hybridssl.objectives import build as build_objectives
from hybridssl.optim import OptimOptions
from hybridssl.optim import build as build_optimizer
from hybridssl.student import Student, make_teacher, update_teacher

TINY = BackboneOptions(name="vit_tiny_patch16_224", args={"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8})
LAYERS = [f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def student() -> Student:
    torch.manual_seed(0)
    context = Context(dim=16, classes=3, named=torch.ones(1, 3, dtype=torch.bool))
    heads = build_objectives({"labels": options_types()["labels"]()}, context)
    return Student(build(TINY, 3, 32), heads)


def move(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


def test_updates_begin_at_nothing_and_are_all_that_moves() -> None:
    backbone, images = build(TINY, 3, 32).eval(), torch.randn(2, 3, 32, 32)
    before = backbone(images).patches
    lora.add(backbone.model, 4)
    torch.testing.assert_close(backbone(images).patches, before, rtol=0, atol=0)
    moving = {name for name, p in backbone.model.named_parameters() if p.requires_grad}
    assert moving == {f"{layer}.lora_{half}.default.weight" for layer in LAYERS for half in "AB"}
    assert backbone.model.blocks[0].attn.qkv.lora_A["default"].weight.shape == (4, 16)


def test_merged_weights_give_the_features_of_the_unmerged_under_the_plain_names() -> None:
    """In double precision: in single the two differ by more than 1e-5 for one draw of the weights in a hundred."""
    plain = build(TINY, 3, 32)
    backbone, images = build(TINY, 3, 32).eval().double(), torch.randn(2, 3, 40, 32).double()
    start = backbone(images).cls
    lora.add(backbone.model, 4)
    move(backbone.model.double())
    unmerged = backbone(images)
    lora.merge(backbone.model)
    merged = backbone(images)
    assert (unmerged.cls - start).abs().max() > 0.1  # it has moved
    for ours, theirs in ((merged.cls, unmerged.cls), (merged.patches, unmerged.patches)):
        assert (ours - theirs).abs().max() < 1e-12
    assert backbone.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "eva02_base_patch14_224", "vit_small_patch16_dinov3"]
)
def test_every_update_is_part_of_the_features(name: str) -> None:
    """Of every family: fused or separate q, k and v, with and without a bias apart, plain and gated MLPs."""
    backbone, images = build(replace(TINY, name=name), 3, 32), torch.randn(2, 3, 32, 32)
    plain = backbone.eval()(images).cls
    lora.add(backbone.model, 2)
    torch.testing.assert_close(backbone(images).cls, plain)
    move(backbone.model)
    backbone(images).cls[:, 0].sum().backward()  # not of a whole row, which a norm makes constant
    moving = {path: p.grad for path, p in backbone.model.named_parameters() if p.requires_grad}
    assert any("q" in path for path in moving)
    assert [path for path, gradient in moving.items() if gradient is None or not gradient.any()] == []


def test_the_optimiser_takes_the_updates_with_layer_decay_and_leaves_the_weights() -> None:
    learner = student()
    lora.add(learner.backbone.model, 4)
    optimizer = build_optimizer(learner.backbone, learner.objectives, OptimOptions(layer_decay=0.5))
    scale = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(learner.backbone.model.named_parameters())
    first, last = (scale[id(named[f"blocks.{i}.mlp.fc1.lora_B.default.weight"])] for i in (0, 1))
    assert first / last == 0.5
    assert id(named["blocks.0.mlp.fc1.base_layer.weight"]) not in scale
    assert id(named["pos_embed"]) not in scale


def test_the_teacher_follows_the_updates_and_keeps_the_weights_to_the_bit() -> None:
    learner = student()
    lora.add(learner.backbone.model, 4)
    teacher = make_teacher(learner)
    before = {name: p.clone() for name, p in teacher.backbone.model.named_parameters()}
    move(learner)
    update_teacher(teacher, learner, 0.75)
    for name, p in teacher.backbone.model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora_" in name), name


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(UserError, match="LoRA needs linear layers"):
        lora.add(timm.create_model("resnet10t", num_classes=0), 4)
