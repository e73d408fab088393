"""What a case costs a machine: parameters, floating-point operations, and seconds measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

REPEATS = 5


def parameters(*models: nn.Module | None) -> int:
    """How many there are; what several models share counts once."""
    found = {id(p): p.numel() for model in models if model is not None for p in model.parameters()}
    return sum(found.values())


def gflops(call: Callable[[], Any]) -> float:
    """10^9 floating-point operations of `call`, a multiplication and an addition counted as two.

    Counts matrix products and convolutions, which is where the work of these models lies (torch.utils.flop_counter).
    Attention runs as plain matrix products meanwhile: the counter does not know every fused kernel.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def seconds(calls: Mapping[str, Callable[[], Any]], device: str, repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of every call. They take turns, so that whatever else the machine does meets all of them."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            if turn:  # the first warms caches and kernels
                spent[name].append(time.perf_counter() - started)
    return {name: median(times) for name, times in spent.items()}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
