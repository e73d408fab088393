from __future__ import annotations

import time

import pytest
import torch

from hybridssl import precision


def test_bf16_is_chosen_where_products_are_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for half, chosen in ((0.5, True), (0.9, False), (10.0, False)):
        taken = {torch.float32: 1.0, torch.bfloat16: half}
        monkeypatch.setattr(precision, "seconds", lambda device, *dtypes, taken=taken: [taken[d] for d in dtypes])
        assert precision.faster_in_bf16("cpu") is chosen


def test_the_measurement_is_short_and_times_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.perf_counter()
    small, half = precision.seconds("cpu", torch.float32, torch.bfloat16)
    assert 0 < small + half < (time.perf_counter() - start) / precision.REPEATS
    monkeypatch.setitem(precision.SIDES, "cpu", (512, 384, 768))  # eight times as much
    assert precision.seconds("cpu", torch.float32)[0] > 2 * small
