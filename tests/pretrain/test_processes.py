"""Two processes take the steps of one with the double batch: the loop itself, over recipes that differ in all they can.

Run as a program, this file becomes the two processes: one import and one launch for all recipes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from accelerate.state import AcceleratorState
from torch.multiprocessing import start_processes

from hybridssl.run import read_state
from pretrain import report
from pretrain.loop import main
from tests.pretrain.conftest import TINY, losses
from tests.pretrain.forks import join, meeting
from tests.pretrain.test_continue import CONTINUED
from tests.pretrain.test_loop import assert_close

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = ["objectives.dino=null", "objectives.ibot=null", "objectives.spread=null"]
MASKED = ["views.mask_probability=1", "views.mask_ratio=[0.75, 0.75]", "views.mask_shape=random"]
RECIPES = {
    "demo": [],
    "continued": CONTINUED,  # the only one with weights to begin with
    "curriculum": ["views.curriculum=0.5", "views.left_out=0.5"],
    "late": ["objectives.ibot.start=0.5", "objectives.labels.start=0.5"],  # no rank waits for a gradient of theirs
    "mae": [*WITHOUT, *MASKED, "objectives.pixels={style: mae, width: 32, depth: 1}"],  # and labels of few views
    "guided": [*WITHOUT, "objectives.guide.columns={age: keep, source: remove, localization: keep prototypes}"],
}


@pytest.mark.timeout(600)
def test_two_processes_equal_one_with_the_double_batch(index: Path, weights: Path, tmp_path: Path) -> None:
    recipes = {name: [*TINY, f"data.train={index}", *own] for name, own in RECIPES.items()}
    recipes["continued"].append(f"backbone.weights={weights}")
    table = tmp_path / "runs.json"
    places = [meeting() for _ in recipes]
    runs = [[*arguments, f"out={tmp_path / name}-two"] for name, arguments in recipes.items()]
    table.write_text(json.dumps([(place.port, run) for place, run in zip(places, runs, strict=True)]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, __file__, str(table)]
    done = subprocess.run(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout

    with mock.patch.object(report, "write", lambda run, *_: run / "report.html"):
        for name, arguments in recipes.items():
            assert main([*arguments, f"out={tmp_path / name}"]) == 0
            assert read_state(tmp_path / f"{name}-two")["machine"] == "2 CPU cores"  # a thread of each process
            assert_close(losses(tmp_path / f"{name}-two"), losses(tmp_path / name), 1e-4)


def one_of_two(rank: int, table: str) -> None:
    with mock.patch.object(report, "write", lambda run, *_: run / "report.html"):
        for port, arguments in json.loads(Path(table).read_text()):
            join(rank, port)  # a run ends with its process group
            assert main(arguments) == 0
            AcceleratorState._reset_state(True)


if __name__ == "__main__":
    import peft  # noqa: F401  # what runs import late, they would import twice

    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    start_processes(one_of_two, args=(sys.argv[1],), nprocs=2, start_method="fork")
