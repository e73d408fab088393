"""What only a CUDA device can show. Runs with `pytest -m gpu`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from hybridssl import attention
from hybridssl.backbone import BackboneOptions, Crops, build
from hybridssl.efficiency import EfficiencyOptions, apply
from hybridssl.precision import faster_in_bf16
from hybridssl.views import render
from pretrain import data
from pretrain.command import load
from pretrain.loop import main
from shards.index import Index
from tests.pretrain.conftest import losses

pytestmark = pytest.mark.gpu


def test_views_on_the_device_equal_those_on_the_cpu(tiny: list[str]) -> None:
    recipe = load([*tiny, "out=x"])
    batch = next(iter(data.loader(recipe, Index.open(recipe.data.train), True, 8, 0, 0, 1)))
    here, there = render(batch, recipe.views), render(batch.to("cuda"), recipe.views)
    for name in ("global_", "local", "clean"):
        assert torch.allclose(getattr(here, name), getattr(there, name).cpu(), atol=1e-4), name


def test_a_run_on_the_device_follows_the_one_on_the_cpu(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [*tiny, "precision=no"]
    assert main([*full, f"out={tmp_path / 'gpu'}"]) == 0
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    assert main([*full, f"out={tmp_path / 'cpu'}"]) == 0
    for a, b in zip(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), strict=True):
        assert a == pytest.approx(b, rel=2e-2, abs=2e-2)  # TF32 and another order of sums


def test_bf16_stays_finite_and_close(tiny: list[str], tmp_path: Path) -> None:
    assert main([*tiny, f"out={tmp_path / 'full'}", "precision=no"]) == 0
    AcceleratorState._reset_state(True)
    assert main([*tiny, f"out={tmp_path / 'half'}", "precision=bf16"]) == 0
    for a, b in zip(losses(tmp_path / "full")[:2], losses(tmp_path / "half")[:2], strict=True):
        assert {k: v for k, v in a.items() if k != "grad_norm"} == pytest.approx(
            {k: v for k, v in b.items() if k != "grad_norm"}, rel=0.1, abs=0.1
        )


@pytest.mark.parametrize("kernel", ["SDPA", "xformers"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_one_pass_over_all_crops_equals_one_a_size(kernel: str, qk_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "SDPA":
        monkeypatch.setattr(attention, "usable", lambda *_: False)
    elif not attention.usable(torch.bfloat16, 64, torch.device("cuda", 0)):
        pytest.skip("no xformers, or one that was built for another CUDA than torch")
    args = {"embed_dim": 128, "depth": 2, "num_heads": 2, "patch_size": 8, "qk_norm": qk_norm}
    torch.manual_seed(0)
    network = build(BackboneOptions(name="vit_tiny_patch16_224", args=args, registers=4), 3, 32).cuda()
    masks = torch.rand(4, 16, device="cuda").argsort(dim=1) < 5
    crops = [Crops(torch.randn(n, 3, s, s, device="cuda"), m) for n, s, m in ((4, 32, masks), (6, 16, None))]
    found = []
    for packed in (False, True):
        apply(network, EfficiencyOptions(packed=packed))
        network.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            seen = network.see(crops)
        sum(one.cls[:, 0].float().sum() + one.patches[..., 1].float().square().sum() for one in seen).backward()
        found.append(([one.cls for one in seen], {n: p.grad for n, p in network.named_parameters()}))
    (apart, wanted), (together, gradients) = found
    torch.testing.assert_close(together, apart, rtol=0, atol=0.05)
    for name, gradient in gradients.items():
        if name.endswith("k_norm.bias"):  # moves all keys alike, which softmax does not see: noise around zero
            continue
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0) > 0.99, name


def test_a_resumed_run_goes_on_with_the_fused_optimiser(tiny: list[str], tmp_path: Path) -> None:
    assert main([*tiny, f"out={tmp_path / 'whole'}"]) == 0
    assert main([*tiny, f"out={tmp_path / 'parts'}"]) == 0
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-4")
    assert main([*tiny, f"out={tmp_path / 'parts'}"]) == 0
    for a, b in zip(losses(tmp_path / "parts"), losses(tmp_path / "whole"), strict=True):
        assert a == pytest.approx(b, rel=2e-2, abs=2e-2)


def test_the_device_says_which_precision_is_faster() -> None:
    assert faster_in_bf16("cuda") == (torch.cuda.get_device_capability() >= (8, 0))
