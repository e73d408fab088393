"""Killed at any moment, a run goes on to the same end, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretrain.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]


def killed(folder: Path, index: Path, count: int) -> dict:
    """`count` deaths of a short run; see kills.py."""
    program = [sys.executable, str(Path(__file__).with_name("kills.py")), str(folder), "0", str(count)]
    arguments = [*TINY, f"data.train={index}", "steps=10", "probe.every=5", "probe.images=20"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*program, *arguments], env=environment, capture_output=True, text=True)
    log = folder / "log.txt"
    assert done.returncode == 0, done.stderr + (log.read_text()[-3000:] if log.is_file() else "")
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(900)
def test_ten_deaths_change_nothing(index: Path, tmp_path: Path) -> None:
    found = killed(tmp_path, index, 10)
    assert found["different"] == found["exports"] == []
    assert sum(found["deaths"].values()) == 10
    assert len(found["deaths"]) == 7  # six points where it hurts, and at random
    assert found["finished"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_deaths_change_nothing(index: Path, tmp_path: Path) -> None:
    found = killed(tmp_path, index, 100)
    assert found["different"] == found["exports"] == []
    assert sum(found["deaths"].values()) == 100
