"""views.left_out in a run: parts of a batch, its log, and what cannot do with fewer patches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pretrain.loop import main
from tests.pretrain.conftest import lines, losses
from tests.pretrain.test_data import batches, same
from tests.pretrain.test_loop import assert_close

HALF = "views.left_out=0.5"


def test_micro_batches_equal_one_batch(tiny: list[str], tmp_path: Path) -> None:
    for name, micro in (("whole", 8), ("parts", 4)):
        assert main([*tiny, HALF, "steps=2", f"batch.micro={micro}", f"out={tmp_path / name}"]) == 0
    assert_close(losses(tmp_path / "parts"), losses(tmp_path / "whole"), 1e-4)
    for line in lines(tmp_path / "whole"):
        assert all(math.isfinite(value) for key, value in line.items() if key.startswith("loss"))


def test_workers_change_nothing(tiny: list[str]) -> None:
    alone, shared = batches(tiny, 3, HALF), batches(tiny, 3, HALF, "data.workers=2")
    assert all(same(a, b) and a.left_out.equal(b.left_out) for a, b in zip(alone, shared, strict=True))
    assert any(batch.left_out.any() for batch in alone)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (["objectives.gram={}"], ["views.left_out=0.5", "objectives.gram reads all patches", "views.left_out=0"]),
        (["views.left_out=1"], ["views.left_out=1", "below 1"]),
    ],
)
def test_what_it_cannot_serve_is_told(own: list[str], words: list[str], tiny, tmp_path: Path, capsys) -> None:
    assert main([*tiny, HALF, *own, f"out={tmp_path / 'bad'}"]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words)
    assert not (tmp_path / "bad").exists()
