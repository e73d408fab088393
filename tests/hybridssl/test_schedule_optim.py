from __future__ import annotations

import pytest
import torch
from torch import nn

from hybridssl import optim
from hybridssl.backbone import BackboneOptions, build
from hybridssl.optim import OptimOptions
from hybridssl.schedule import cosine, first_step, ramp, warmup_cosine

TINY = BackboneOptions(name="vit_tiny_patch16_224", args={"embed_dim": 32, "depth": 3, "num_heads": 2}, registers=2)


def test_ends_and_middles() -> None:
    assert [cosine(0.2, 1.0, p) for p in (-1, 0, 0.5, 1, 2)] == pytest.approx([0.2, 0.2, 0.6, 1.0, 1.0])
    assert [warmup_cosine(1.0, 0.0, 0.1, p) for p in (0, 0.05, 0.1, 0.55, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert warmup_cosine(1.0, 0.0, 0.0, 0.0) == 1.0
    assert [ramp(0.5, p) for p in (0, 0.25, 0.5, 1)] == [0.0, 0.5, 1.0, 1.0]
    assert ramp(0.0, 0.0) == 1.0
    assert [ramp(0.2, p, start=0.5) for p in (0.4, 0.5, 0.6, 0.7, 1)] == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.0])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1 / 3, 0.7, 0.75, 0.999])
def test_the_first_step_of_a_share_is_the_one_at_which_progress_reaches_it(share: float) -> None:
    for steps in (1, 3, 10, 650, 6_500, 99_999):
        assert first_step(share, steps) == next(step for step in range(steps + 1) if step / steps >= share)


def groups_by_name(
    options: OptimOptions, network: BackboneOptions = TINY
) -> tuple[dict[str, dict], nn.Module, torch.optim.Optimizer]:
    backbone = build(network, 3, 32)
    heads = nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8))
    optimizer = optim.build(backbone, heads, options)
    model = nn.ModuleDict({"backbone": backbone, "heads": heads})
    of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))  # each once
    return {name: of[id(p)] for name, p in model.named_parameters()}, model, optimizer


def test_layer_decay_patch_embedding_and_weight_decay_reach_the_right_parameters() -> None:
    groups, _, optimizer = groups_by_name(OptimOptions(layer_decay=0.5, patch_embed_lr=0.2))
    scale = {name: group["scale"] for name, group in groups.items()}
    assert scale["heads.0.weight"] == 1.0
    assert scale["backbone.model.norm.weight"] == 1.0
    blocks = [scale[f"backbone.model.blocks.{i}.mlp.fc1.weight"] for i in range(3)]
    assert blocks[0] / blocks[1] == blocks[1] / blocks[2] == 0.5
    assert scale["backbone.model.patch_embed.proj.weight"] == pytest.approx(0.2 * scale["backbone.model.cls_token"])
    decayed = {name for name, group in groups.items() if group["decays"]}
    assert "backbone.model.blocks.0.attn.qkv.weight" in decayed
    assert "heads.0.weight" in decayed
    free = {
        n for n in groups if n.endswith(("bias", "norm.weight", "norm1.weight", "cls_token", "reg_token", "pos_embed"))
    }
    assert not decayed & (free | {"backbone.mask_token", "heads.1.weight"})
    shown = optim.set_hyperparameters(optimizer, OptimOptions(lr=1.0, warmup=0.0, weight_decay=(0.1, 0.3)), 256, 0.0)
    assert shown == {"lr": pytest.approx(0.5), "weight_decay": pytest.approx(0.1)}  # sqrt(256 / 1024)
    assert groups["heads.0.weight"]["lr"] == pytest.approx(0.5)
    assert groups["heads.0.weight"]["weight_decay"] == pytest.approx(0.1)
    assert groups["backbone.mask_token"]["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("name", "own"),
    [("vit_small_patch16_rope_mixed_224", "rope.freqs"), ("deit_tiny_distilled_patch16_224", "dist_token")],
)
def test_what_an_architecture_names_takes_no_weight_decay_and_learns_like_the_stem(name: str, own: str) -> None:
    network = BackboneOptions(name=name, args={"embed_dim": 32, "depth": 3, "num_heads": 2})
    groups, *_ = groups_by_name(OptimOptions(layer_decay=0.5), network)
    scale = {key.removeprefix("backbone.model."): group["scale"] for key, group in groups.items()}
    assert not groups[f"backbone.model.{own}"]["decays"]
    assert scale[own] == scale["cls_token"]
    assert scale["norm.weight"] == 1.0
    blocks = [scale[f"blocks.{i}.norm1.weight"] for i in range(3)]
    assert [scale["cls_token"], *blocks] == [0.125, 0.25, 0.5, 1.0]


def test_what_is_treated_alike_shares_a_group() -> None:
    """One kernel updates a group, so there are few: patch embedding and the rest, with weight decay and without."""
    assert len(groups_by_name(OptimOptions(layer_decay=1.0))[2].param_groups) == 4
    # Three of the stem, two of each block; the last one's hold the final norm and the heads too.
    assert len(groups_by_name(OptimOptions(layer_decay=0.5))[2].param_groups) == 3 + 2 * 3


def test_fused_updates_are_those_of_the_plain_formula() -> None:
    optimizer = groups_by_name(OptimOptions(layer_decay=0.5))[2]
    optim.set_hyperparameters(optimizer, OptimOptions(lr=0.01, warmup=0.0), 1024, 0.5)
    groups = [{**g, "params": [p.detach().clone() for p in g["params"]]} for g in optimizer.param_groups]
    plain = torch.optim.AdamW([{**g, "fused": False, "foreach": False} for g in groups])
    for _ in range(3):
        for ours, theirs in zip(optimizer.param_groups, groups, strict=True):
            for p, q in zip(ours["params"], theirs["params"], strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
    for ours, theirs in zip(optimizer.param_groups, groups, strict=True):
        torch.testing.assert_close(ours["params"], theirs["params"], rtol=1e-5, atol=1e-7)


def test_the_state_by_name_outlives_a_regrouping() -> None:
    _, model, optimizer = groups_by_name(OptimOptions())
    for p in list(model.parameters())[::2]:  # some never had a gradient
        p.grad = torch.randn_like(p)
    optim.set_hyperparameters(optimizer, OptimOptions(), 64, 0.5)
    optimizer.step()
    tensors = dict(optim.named_state(optimizer, model))
    other = torch.optim.AdamW([{"params": [p]} for p in reversed(list(model.parameters()))])
    for p in model.parameters():  # a run that goes back has moments that its checkpoint does not know
        p.grad = torch.randn_like(p)
    other.step()
    optim.load_named_state(other, model, tensors)
    again = dict(optim.named_state(other, model))
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[k], again[k]) for k in tensors)
