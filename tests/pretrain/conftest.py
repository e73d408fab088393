"""A small demo index, a tiny recipe on it, and ways to run it in this process and as a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from hybridssl import backbone
from pretrain.command import load
from shards import demo

TINY = [
    "recipe=demo",
    "batch.size=8",
    "steps=4",
    "data.workers=0",
    "precision=no",  # which is faster is measured, so two runs of a test could take different ones
    "threads=1",  # the second one waits for a core as often as it helps, and spins
    "views.global_size=32",
    "views.local_size=16",
    "backbone.args={patch_size: 8, depth: 2, embed_dim: 32, num_heads: 2}",
    "objectives.dino={prototypes: 16, hidden: 32, bottleneck: 8}",
    "objectives.ibot={prototypes: 16, hidden: 32, bottleneck: 8}",
    "objectives.spread.group=4",
    "objectives.labels.init=random",
    "text.encoder=",
    "log.every=1",
    "save.every=2",
    "probe.every=0",
]


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "demo"
    demo.generate(folder, samples=120, seed=0, size=48)
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of TINY's backbone, to continue from."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(backbone.build(load([*TINY, "data.train=d", "out=o"]).backbone, 3, 32).model.state_dict(), path)
    return path


@pytest.fixture
def tiny(index: Path) -> list[str]:
    return [*TINY, f"data.train={index}"]


@pytest.fixture(autouse=True)
def _same_model_size(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich takes its width from one of these, and from the others that there is a terminal, where there is none."""
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _no_weights_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The doctor proposes others where released ones lie in the cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.getbasetemp() / "no-hub"))


@pytest.fixture(autouse=True)
def _own_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """accelerate keeps device and precision for a process; precision=auto is bf16 where that is faster, and tests name
    others."""
    AcceleratorState._reset_state(True)
    yield
    if request.node.get_closest_marker("gpu"):
        AcceleratorState._reset_state(True)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[dict[str, float]]:
    """The losses and the gradient norm of every logged step."""
    wanted = ("loss/", "grad_norm")
    return [{k: v for k, v in line.items() if k.startswith(wanted)} for line in lines(run)]


def launch(arguments: list[str], **popen) -> subprocess.Popen:
    """The command a user types, on the CPU."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pretrain", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen)
