from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from hybridssl.backbone import BackboneOptions, build, load_weights
from hybridssl.errors import UserError

TINY = BackboneOptions(
    name="vit_tiny_patch16_224", args={"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}, registers=4
)


def test_tokens_have_their_parts_at_any_size_that_the_patch_divides() -> None:
    backbone = build(TINY, 3, 32).eval()
    tokens = backbone(torch.randn(2, 3, 48, 32))
    assert tokens.cls.shape == (2, 32)
    assert tokens.registers.shape == (2, 4, 32)
    assert tokens.patches.shape == (2, 24, 32)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_base_patch14_dinov2", "deit3_small_patch16_224"])
def test_families_of_timm(name: str) -> None:
    args = {"depth": 1, "embed_dim": 32, "num_heads": 2} | ({"init_values": 1e-5} if "dinov3" not in name else {})
    backbone = build(BackboneOptions(name=name, args=args), 1, 56 if "14" in name else 64).eval()
    side = 4
    tokens = backbone(torch.randn(1, 1, side * backbone.patch_size, side * backbone.patch_size))
    assert tokens.patches.shape == (1, side * side, 32)
    whole = backbone.model.forward_features(torch.ones(1, 1, 56 if "14" in name else 64, 56 if "14" in name else 64))
    assert torch.allclose(backbone(torch.ones(1, 1, *[56 if "14" in name else 64] * 2)).cls, whole[:, 0])


def test_a_hidden_patch_cannot_be_seen_and_the_others_can() -> None:
    backbone = build(TINY, 3, 32).eval()
    image, mask = torch.randn(1, 3, 32, 32), torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True  # row 1, column 1 of a 4 x 4 grid
    changed = image.clone()
    changed[:, :, 8:16, 8:16] += 1.0
    assert torch.equal(backbone(image, mask).patches, backbone(changed, mask).patches)
    assert not torch.equal(backbone(image).patches, backbone(changed).patches)
    changed[:, :, :8, :8] += 1.0
    assert not torch.equal(backbone(image, mask).cls, backbone(changed, mask).cls)


def test_the_mask_token_learns_and_a_mask_does_not_outlive_its_call() -> None:
    backbone = build(TINY, 3, 32)
    mask = torch.ones(1, 16, dtype=torch.bool)
    backbone(torch.randn(1, 3, 32, 32), mask).cls[:, 0].sum().backward()  # a sum over all D is constant after a norm
    assert backbone.mask_token.grad is not None
    assert backbone.mask_token.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4"):
        backbone(torch.randn(1, 4, 32, 32), mask)
    before = backbone.eval()(torch.ones(1, 3, 32, 32)).cls
    with torch.no_grad():
        backbone.mask_token.add_(1.0)
    assert torch.equal(before, backbone(torch.ones(1, 3, 32, 32)).cls)


def test_weights_of_another_size_are_resampled_and_coverage_is_told(tmp_path: Path) -> None:
    small, large = build(TINY, 3, 32), build(TINY, 3, 64)
    save_file(small.model.state_dict(), tmp_path / "model.safetensors")
    coverage = load_weights(large, replace(TINY, weights=str(tmp_path)))
    assert coverage.matched == coverage.total
    assert torch.equal(large.model.blocks[1].mlp.fc1.weight, small.model.blocks[1].mlp.fc1.weight)
    assert large.model.pos_embed.shape[1] == 64 + 5


def test_a_released_eva_keeps_positions_and_final_norm_at_another_size(tmp_path: Path) -> None:
    """Its table of positions is resampled, and the norm that stood behind the mean over patches is our final one."""
    options = BackboneOptions(
        "eva02_tiny_patch14_224", {"embed_dim": 24, "depth": 2, "num_heads": 2}, weights=str(tmp_path)
    )
    released = timm.create_model(options.name, num_classes=0, img_size=56, **options.args)
    assert hasattr(released, "fc_norm")
    with torch.no_grad():
        released.fc_norm.weight.fill_(0.5)
    save_file(released.state_dict(), tmp_path / "model.safetensors")
    backbone = build(options, 3, 28)
    coverage = load_weights(backbone, options)
    assert coverage.missing == ()
    assert backbone.model.norm.weight.eq(0.5).all()
    here, there = backbone.model.pos_embed[0, 1:], released.pos_embed[0, 1:]
    assert torch.allclose(here.mean(0), there.mean(0), atol=0.01)  # 16 places became 4


def test_loading_fails_when_too_little_matches(tmp_path: Path) -> None:
    other = build(replace(TINY, args={**TINY.args, "embed_dim": 48}), 3, 32)
    save_file(other.model.state_dict(), tmp_path / "other.safetensors")
    backbone = build(TINY, 3, 32)
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    with pytest.raises(UserError, match=r"of 31 backbone tensors.*min_match=0\.9"):
        load_weights(backbone, replace(TINY, weights=str(tmp_path / "other.safetensors")))
    assert all(torch.equal(before[k], v) for k, v in backbone.model.state_dict().items())


def test_missing_registers_are_named_as_fresh(tmp_path: Path) -> None:
    save_file(build(replace(TINY, registers=0), 3, 32).model.state_dict(), tmp_path / "plain.safetensors")
    backbone, options = build(TINY, 3, 32), replace(TINY, weights=str(tmp_path / "plain.safetensors"))
    coverage = load_weights(backbone, options)
    assert backbone.model.pos_embed[0, 1:5].abs().sum() == 0  # positions belong to the patches, as they did
    assert "reg_token" in coverage.missing
    assert "reg_token" in str(coverage)


@pytest.mark.parametrize(
    ("options", "size", "words"),
    [
        (BackboneOptions(name="vit_smal_patch16_224"), 224, ["vit_smal_patch16_224", "vit_small_patch16_224"]),
        (BackboneOptions(name="swin_tiny_patch4_window7_224"), 224, ["swin_tiny_patch4_window7_224"]),
        (replace(TINY, args={**TINY.args, "depht": 3}), 32, ["depht"]),
        (TINY, 36, ["views.global_size=36", "patch of 8", "try 32"]),
    ],
)
def test_what_cannot_be_built_is_named(options: BackboneOptions, size: int, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build(options, 3, size)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("weights", ["nowhere", "weights.pth", "nowhere/x/y.safetensors"])
def test_weights_that_are_not_there_are_named(weights: str, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"\x80\x04")
    path = str(tmp_path / weights) if weights.endswith("pth") else weights
    with pytest.raises(UserError, match="weights"):
        load_weights(build(TINY, 3, 32), replace(TINY, weights=path))
