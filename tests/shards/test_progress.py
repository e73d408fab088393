from __future__ import annotations

import pytest

from shards.progress import _lines


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    tick = _lines("packing", lambda: now)
    tick(400, 1000)  # what an interrupted build left
    for second in range(1, 62):
        now = float(second)
        tick(400 + 5 * second, 1000)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "packing: 550 of 1,000, 5.0 a second, 1.5 min left",
        "packing: 700 of 1,000, 5.0 a second, 1.0 min left",
    ]


def test_the_next_part_of_a_task_starts_anew(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    tick = _lines("comparing", lambda: now)
    tick(0, 10)
    now = 100.0
    tick(10, 10)
    tick(1, 500)  # of another kind, with another total
    for second in range(1, 32):
        now = 100.0 + second
        tick(1 + 2 * second, 500)
    said = capsys.readouterr().err.splitlines()
    assert said[1:] == ["comparing: 61 of 500, 2.0 a second, 3.7 min left"]
