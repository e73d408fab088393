from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.loop import main
from pretrain.profiling import NEEDED, STEPS


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
