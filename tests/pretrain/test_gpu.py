"""What only a CUDA device can show. Runs with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridssl.views import render
from pretrain import data
from pretrain.loop import main
from pretrain.recipe import load
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
    assert main([*tiny, f"out={tmp_path / 'gpu'}"]) == 0
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    assert main([*tiny, f"out={tmp_path / 'cpu'}"]) == 0
    AcceleratorState._reset_state(True)
    for a, b in zip(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), strict=True):
        assert a == pytest.approx(b, rel=2e-2, abs=2e-2)  # TF32 and another order of sums


def test_bf16_stays_finite_and_close(tiny: list[str], tmp_path: Path) -> None:
    assert main([*tiny, f"out={tmp_path / 'full'}"]) == 0
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    assert main([*tiny, f"out={tmp_path / 'half'}", "precision=bf16"]) == 0
    for a, b in zip(losses(tmp_path / "full")[:2], losses(tmp_path / "half")[:2], strict=True):
        assert {k: v for k, v in a.items() if k != "grad_norm"} == pytest.approx(
            {k: v for k, v in b.items() if k != "grad_norm"}, rel=0.1, abs=0.1
        )
