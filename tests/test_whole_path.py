"""Images in, a backbone out, judged: the commands of the README, as commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from benchmarks.common import drawn
from finetune.results import Result, find
from tests.pretrain.conftest import TINY

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def call(*command: str, cwd: Path = ROOT, code: int = 0) -> str:
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == code, done.stdout
    return done.stdout


def python(module: str, *arguments: str, code: int = 0) -> str:
    return call(sys.executable, "-m", module, *arguments, code=code)


def accelerate(*arguments: str) -> str:
    launch = (str(BIN / "accelerate"), "launch", "--quiet", "--num_processes", "1", "--num_machines", "1")
    return call(*launch, "--mixed_precision", "no", "--dynamo_backend", "no", "pretrain", *arguments)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No features of another run, or of another version, are read, and none are left in the home folder."""
    monkeypatch.setenv("HYBRIDSSL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 photographs of 18 patients in a folder with an odd name, and a table that names two diagnoses."""
    folder = tmp_path_factory.mktemp("my photos")
    lines = ["path,label,group,split,age,sex"]
    for i in range(36):
        picture = np.random.default_rng(i).integers(0, 120, (40, 50, 3), dtype=np.uint8)
        picture[:, :, i % 2 * 2] += 100
        name = f"Fall {i:02d}.v1.jpg"
        cv2.imwrite(str(folder / name), picture)
        split = ("train", "train", "val", "test")[(i // 2) % 4]
        lines.append(f"{name},{('nevus', 'melanoma')[i % 2]},p{i // 2},{split},{30 + i},{('f', 'm')[i // 8 % 2]}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


@pytest.mark.timeout(1800)  # a dozen processes, each of which imports torch
def test_the_commands_of_the_readme(photos: Path, tmp_path: Path) -> None:
    data, run, model, out = (str(tmp_path / name) for name in ("data", "run", "model", "results"))
    python("shards", "build", "--images", str(photos), "--table", str(photos / "labels.csv"), "--out", data)
    accelerate(*TINY, f"data.train={data}", f"out={run}")
    python("hybridssl", "export", run, "--out", model)
    for spec in (model, f"random:{model}"):
        place = out + ("/random" if spec.startswith("random") else "/ours")
        python("finetune", "knn", "--backbone", spec, "--data", data, "--out", place)
    python("finetune", "probe", "--backbone", model, "--data", data, "--out", out + "/ours", "--methods", "logistic")
    python("finetune", "report", out, "--out", str(tmp_path / "report.html"))

    results = {(r.path.parent.parent.name, r.protocol): r for r in find([Path(out)])}
    assert set(results) == {("ours", "knn"), ("random", "knn"), ("ours", "logistic")}
    value = results["ours", "knn"].metrics["balanced_accuracy"].value
    assert f"{value:.3f}" in (tmp_path / "report.html").read_text()
    recorded = json.loads((Path(model) / "pretraining.json").read_text())
    assert recorded["samples"] == 20  # the split `train` alone: val and test were not read
    logistic = [f"{out}/{name}/logistic" for name in ("ours", "random")]
    python(
        "finetune",
        "probe",
        "--backbone",
        f"random:{model}",
        "--data",
        data,
        "--out",
        out + "/random",
        "--methods",
        "logistic",
    )
    said = python("finetune", "compare", *logistic, "--out", out)
    assert re.search(r"(is better|is worse|not shown to be better or worse) than", " ".join(said.split()))
    python("finetune", "calibrate", logistic[0])
    python("finetune", "fair", logistic[0], "--by", "sex", "--least", "2")
    for page in ("compare-logistic", "ours/calibrate-logistic", "ours/fair-sex-logistic"):
        assert (Path(out) / page / "report.html").is_file()
    import timm

    assert timm.create_model(f"local-dir:{model}", num_classes=0).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 32)


@pytest.mark.timeout(900)
def test_an_index_whose_test_images_were_read_in_pretraining_is_refused(photos: Path, tmp_path: Path) -> None:
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    python("shards", "build", "--images", str(photos), "--table", str(photos / "labels.csv"), "--out", data)
    python("pretrain", *TINY, "steps=1", f"data.train={data}", f"out={run}", "data.splits=[train, test]")
    said = python("finetune", "knn", "--backbone", run, "--data", data, "--out", str(tmp_path / "r"), code=2)
    assert "8 val or test images" in said
    assert "--allow-leak" in said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_learns_what_random_weights_do_not_have(tmp_path: Path) -> None:
    data, run = str(tmp_path / "demo"), str(tmp_path / "run")
    python("shards", "demo", "--out", data)
    accelerate("recipe=demo", f"data.train={data}", f"out={run}")
    for name, spec in (("ours", run), ("random", f"random:{run}"), ("histogram", "histogram")):
        python("finetune", "knn", "--backbone", spec, "--data", data, "--out", str(tmp_path / "results" / name))
    found: dict[str, Result] = {r.path.parent.parent.name: r for r in find([tmp_path / "results"])}
    gap = (drawn(found["ours"]) - drawn(found["random"])).interval
    assert gap.low > 0, f"ours - random: {gap}"
    assert found["ours"].metrics["balanced_accuracy"].value > found["histogram"].metrics["balanced_accuracy"].value
