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
