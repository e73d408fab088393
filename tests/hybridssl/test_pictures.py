"""Attention as it is computed by hand, in several architectures; one kind of patch has one colour and similarity 1."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from hybridssl import pictures

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}


def model_of(name: str = "vit_tiny_patch16_224", **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=0, **arguments).eval()


@pytest.mark.parametrize(("registers", "cls"), [(0, True), (2, True), (0, False)])
@torch.no_grad()
def test_attention_is_the_softmax_of_queries_and_keys(registers: int, cls: bool) -> None:
    pool = "token" if cls else "avg"
    model = model_of(**TINY, reg_tokens=registers, class_token=cls, global_pool=pool)
    images = torch.randn(3, 3, 32, 32)
    module = model.blocks[-1].attn  # type: ignore[index]
    caught: list[torch.Tensor] = []
    hook = module.qkv.register_forward_hook(lambda m, i, output: caught.append(output))
    before = module.fused_attn
    got = pictures.cls_attention(model, 3, lambda: [model(part) for part in images.split(2)])
    hook.remove()
    q, k, _ = torch.cat(caught).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)  # each [N, heads, T, 16]
    weights = (q @ k.transpose(2, 3) / 4).softmax(-1).mean(1)
    expected = weights[:, 0, 1 + registers :] if cls else weights.mean(1)
    assert got is not None
    np.testing.assert_allclose(got, expected.reshape(3, 4, 4), atol=1e-5)
    assert module.fused_attn == before


def test_attention_of_rotary_transformers_too_and_none_where_there_is_none() -> None:
    images = torch.randn(2, 3, 32, 32)
    rotary = model_of("eva02_tiny_patch14_224", img_size=32, patch_size=8, depth=2)
    got = pictures.cls_attention(rotary, 2, lambda: rotary(images))
    assert got is not None
    assert got.shape == (2, 4, 4)
    assert (got.sum((1, 2)) < 1).all(), "the class token keeps a part for itself"
    windows = model_of("swin_tiny_patch4_window7_224", img_size=64, window_size=1, depths=(1, 1, 1, 1), embed_dim=24)
    for model in (model_of("resnet10t"), windows):
        assert pictures.cls_attention(model, 2, lambda model=model: model(torch.randn(2, 3, 64, 64))) is None


def test_patch_colours_give_one_kind_of_patch_one_colour() -> None:
    kinds = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 2]])
    colours = pictures.patch_colours(torch.eye(8)[kinds] * 3).reshape(2, 4, 3)
    for kind in range(3):
        assert len(np.unique(colours[kinds == kind], axis=0)) == 1
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) == 3


def test_similarity_is_one_for_the_same_patch_whatever_all_share() -> None:
    kinds = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 2]])
    patches = torch.eye(8)[kinds] + 50
    similar = pictures.patch_similarity(patches, patches[0, 0]).reshape(2, 4)
    np.testing.assert_allclose(similar[kinds == 0], 1, atol=1e-5)
    assert (similar[kinds != 0] < 0.1).all()


def test_glow_keeps_to_its_ends() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    weights = np.array([[0.2, 0.2], [0.2, 0.4]], dtype=np.float32)
    own, common = pictures.glow(image, weights), pictures.glow(image, weights, (0, 1))
    assert own.max() > common.max() + 50, "0.4 is the brightest of its own scale, and dim where 1 is"
    assert (pictures.glow(image, weights, (0.5, 1)) == pictures.glow(image, 0 * weights, (0, 1))).all()
