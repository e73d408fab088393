"""views.left_out: the student sees some global views short, each as if it were alone, and the others as before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hybridssl.backbone import BackboneOptions, build
from hybridssl.objectives import Context, options_types
from hybridssl.objectives import build as build_objectives
from hybridssl.student import Student
from hybridssl.types import Batch
from hybridssl.views import Item, ViewOptions, collate, crop, generator, render

OPTIONS = ViewOptions(global_size=32, local_size=16, local_count=2, left_out=0.5)
HEAD = {"prototypes": 8, "hidden": 16, "bottleneck": 8}
ROTARY = BackboneOptions("vit_small_patch16_dinov3", {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2})
PLAIN = BackboneOptions("vit_tiny_patch16_224", {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2})


def student(options: BackboneOptions = PLAIN) -> Student:
    torch.manual_seed(0)
    backbone = build(options, 3, 32)
    chosen = {name: options_types()[name](**HEAD) for name in ("dino", "ibot")} | {
        "labels": options_types()["labels"]()
    }
    return Student(backbone, build_objectives(chosen, Context(backbone.dim, 3, torch.ones(1, 3).bool()))).eval()


def batch(options: ViewOptions = OPTIONS, images: int = 6) -> Batch:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(images)]
    labels = np.array([1, 0, 0], np.uint8)
    crops = [crop(p, generator(0, 0, i), options, 8, i, clean=i < 3) for i, p in enumerate(pictures)]
    return collate([Item(c, labels, 0, c.clean is not None) for c in crops]).to("cpu")


@torch.no_grad()
@pytest.mark.parametrize("options", [PLAIN, ROTARY], ids=lambda o: o.name)
@pytest.mark.parametrize("packed", [True, False])
def test_every_view_is_seen_as_if_it_were_alone(options: BackboneOptions, packed: bool) -> None:
    learner, given = student(options), batch()
    learner.backbone.packed = packed
    views, masks = render(given, OPTIONS), given.masks.flatten(0, 1)
    assert given.left_out is not None
    assert 0 < given.short < 12
    tokens, left_out = learner.look(views, masks, given.unmasked, given), given.left_out.flatten(0, 1)
    for i, image in enumerate(views.global_):
        if masks[i].any():
            expected = learner.backbone(image[None], masks[i][None])
            torch.testing.assert_close(tokens.global_.patches[i], expected.patches[0], atol=1e-5, rtol=1e-4)
        else:
            expected = learner.backbone.visible(image[None], left_out[i][None])
            assert expected.patches.shape[1] == given.kept == 8
            assert not tokens.global_.patches[i].any()
        torch.testing.assert_close(tokens.global_.cls[i], expected.cls[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(tokens.global_.registers[i], expected.registers[0], atol=1e-5, rtol=1e-4)
    assert views.clean is not None
    assert tokens.clean is not None
    clean = learner.backbone(views.clean)
    torch.testing.assert_close(tokens.clean.cls, clean.cls, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tokens.clean.patches, clean.patches, atol=1e-5, rtol=1e-4)


def test_all_views_may_be_short_or_none() -> None:
    for probability, short in ((0.0, 12), (1.0, 0)):
        options = replace(OPTIONS, mask_probability=probability)
        given = batch(options)
        assert given.short == short
        learner = student()
        views = replace(render(given, options), clean=None)
        seen = learner.look(views, given.masks.flatten(0, 1), given.unmasked, given if given.short else None)
        assert seen.global_.cls.shape[0] == seen.global_.patches.shape[0] == 12
        seen.global_.cls.sum().backward()
        assert all(p.grad is not None for n, p in learner.backbone.named_parameters() if "mask_token" not in n)
