"""The doors that every benchmark goes through: what is there is used again only where it is what was asked for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import common, sets
from hybridssl.recipe import to_yaml
from pretrain import command


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of `recipe=demo steps=7`, as far as a benchmark looks at it."""
    out = tmp_path / "ssl"
    out.mkdir()
    arguments = ["recipe=demo", "steps=7", "data.train=here", "data.probe=there", f"out={out}", "threads=2"]
    (out / "recipe.yaml").write_text(to_yaml(command.load(arguments)))
    (out / "report.html").touch()
    return out


def test_a_finished_run_is_used_again_only_for_its_own_recipe(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was trained again"))
    sets.pretrain(run, Path("elsewhere"), Path("x"), ["recipe=demo", "steps=7", "log.every=3"])  # what may change
    with pytest.raises(SystemExit, match=r"(?s)ssl is a run of another recipe:.*steps: 7 -> 9.*HYBRIDSSL_WORK"):
        sets.pretrain(run, Path("here"), Path("x"), ["recipe=demo", "steps=9"])


def test_results_older_than_their_run_are_made_again(run: Path, tmp_path: Path) -> None:
    found = tmp_path / "results" / "knn"
    assert not sets.judged("histogram", found)
    found.mkdir(parents=True)
    (found / "results.json").touch()
    assert sets.judged("histogram", found)
    for spec in (str(run), f"random:{run}"):
        os.utime(run / "report.html", (1, 1))
        assert sets.judged(spec, found)
        assert not sets.judged(spec, found, tmp_path / "results" / "logistic")
        later = (found / "results.json").stat().st_mtime + 5
        os.utime(run / "report.html", (later, later))
        assert not sets.judged(spec, found)


def test_a_copy_without_git_is_named_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("HYBRIDSSL_COMMIT", raising=False)
    assert common.machine()["commit"] == "unknown"
    monkeypatch.setenv("HYBRIDSSL_COMMIT", "abc1234")
    assert common.machine()["commit"] == "abc1234"
