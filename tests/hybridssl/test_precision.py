from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridssl import precision


def test_bf16_is_chosen_where_products_are_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for half, chosen in ((0.5, True), (0.9, False), (10.0, False)):
        taken = {torch.float32: 1.0, torch.bfloat16: half}
        monkeypatch.setattr(precision, "seconds", lambda device, *dtypes, taken=taken: [taken[d] for d in dtypes])
        assert precision.faster_in_bf16("cpu") is chosen


def test_the_measurement_is_short() -> None:
    start = time.perf_counter()
    whole, half = precision.seconds("cpu", torch.float32, torch.bfloat16)
    assert 0 < whole + half < (time.perf_counter() - start) / precision.REPEATS


def test_the_measurement_times_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of work done: how long a product takes depends on what else the machine does."""
    work = FlopCounterMode(display=False)
    monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=work.get_total_flops))
    with work:
        for sides in ((128, 384, 384), (512, 384, 768)):
            monkeypatch.setitem(precision.SIDES, "cpu", sides)
            assert precision.seconds("cpu", torch.float32, torch.bfloat16) == [2 * math.prod(sides)] * 2
