from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hybridssl.errors import UserError
from pretrain.command import load
from pretrain.loop import main
from pretrain.profiling import NEEDED, STEPS
from pretrain.record import Record
from tests.pretrain.conftest import lines


def test_a_trace_of_some_steps_and_a_table(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    assert main([*tiny, f"out={out}", f"steps={NEEDED + 1}", "save.every=1000", "profile=true"]) == 0
    table = (out / "profile" / "operations.txt").read_text()
    assert table.splitlines()[0].split() == ["operation", "share", "ms", "a", "step", "calls"]
    assert "aten::" in table
    events = json.loads((out / "profile" / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name", "").startswith("ProfilerStep#") for event in events) == STEPS
    shown = capsys.readouterr().err
    assert table in shown
    assert str(out / "profile" / "trace.json") in shown


def test_a_run_that_is_too_short_is_told_so(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*tiny, f"out={tmp_path / 'run'}", "profile=true"]) == 2
    assert f"profile=true needs {NEEDED} steps, and 4 are left" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_so_are_its_other_processes(tiny: list[str], tmp_path: Path) -> None:
    """Or they would wait for the first, which is gone."""
    recipe, second = load([*tiny, f"out={tmp_path}", "profile=true"]), SimpleNamespace(is_main_process=False)
    with pytest.raises(UserError, match="profile=true needs"):
        Record(recipe, cast(Any, second), tmp_path, recipe.data.open(), 0, cast(Any, None))


def test_the_same_command_goes_on_with_few_steps_left_and_after_the_end(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    assert main([*tiny, f"out={out}"]) == 0
    for steps, left in ((5, 1), (5, 0)):
        assert main([*tiny, f"out={out}", f"steps={steps}", "profile=true"]) == 0
        assert f"a trace takes {NEEDED} steps, and {left} are left" in capsys.readouterr().err
    assert lines(out)[-1]["step"] == 5
    assert not (out / "profile").exists()
