"""What is set before the first step."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.command import load
from pretrain.loop import main
from pretrain.start import taken_again
from tests.pretrain.conftest import TINY

FAULTS = """
import ctypes, resource, torch
from pretrain.start import keep_freed_memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages, where a kernel gives them, are few
torch.set_num_threads(1)
def fresh_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(1 << 24)  # 64 MiB: beyond what glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = fresh_pages()
keep_freed_memory()
fresh_pages()
print(plain, fresh_pages(), 4 * (1 << 26) // resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_what_is_freed_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    plain, kept, asked = map(int, done.stdout.split())
    assert plain > 0.9 * asked  # each time all of them
    assert kept < 100


def test_a_longer_run_takes_no_turn_twice(tiny: list[str], tmp_path: Path, capsys, monkeypatch) -> None:
    """Or labels that have joined at step 2 of 4 would rest at step 4 of 16, and small crops come back."""
    monkeypatch.setattr("pretrain.report.write", lambda run, data=None: run / "report.html")
    turns = ["objectives.labels.start=0.5", "views.curriculum=0.75"]
    run = [*tiny, *turns, f"out={tmp_path / 'run'}"]
    assert main(run) == 0
    assert main([*run, "steps=16"]) == 2
    told = capsys.readouterr().err
    assert "back to 25% of its length" in told
    assert f"branch={tmp_path / 'run'} steps=16 views.curriculum=0.1875 objectives.labels.start=0.125" in told
    assert main([*run, "steps=5"]) == 0  # step 4 is .8 of it


@pytest.mark.parametrize(
    ("key", "step", "taken"),
    [
        ("objectives.labels.head_first=0.5", 60, "objectives.labels.head_first"),
        ("objectives.labels.head_first=0.5", 40, ""),  # not yet
        ("objectives.labels.unfreeze_at=0.5", 60, ""),  # prototypes that begin at random never rest
        ("objectives.labels={init: text, unfreeze_at: 0.5}", 60, "objectives.labels.unfreeze_at"),
        ("objectives.labels={init: text, unfreeze_at: 1.0}", 100, ""),  # they always rest
        ("optim.heads_first=0.5", 60, "optim.heads_first"),
        ("objectives.dino.freeze_last=0.5", 60, "objectives.dino.freeze_last"),
        ("objectives.dino={start: 0.2, freeze_last: 0.2}", 45, "objectives.dino.freeze_last"),  # until .4
        ("objectives.dino={start: 0.2, freeze_last: 0.2}", 35, "objectives.dino.start"),
    ],
)
def test_which_turns_count(key: str, step: int, taken: str) -> None:
    recipe = load([*TINY, "data.train=d", "out=o", "steps=200", key])
    assert list(taken_again(recipe, step, 100)) == ([taken] if taken else [])


def test_a_set_that_no_probe_would_judge_is_refused(tiny: list[str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    assert main([*tiny, "probe.every=0", "probe.keep=s3://somebody:secret@nowhere/set", f"out={out}"]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("probe.keep=s3://nowhere/set", "probe.every=0", "leave probe.keep out"))
    assert not out.exists()
