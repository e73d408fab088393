"""Which precision a device is faster in. Measured, because what it says of itself does not tell: a GPU that emulates
bf16 supports it, and a CPU without units for it takes ten times as long (docs/log.md)."""

from __future__ import annotations

import time

import torch
from torch import Tensor

WORTH = 1.3  # products must be faster by this for a whole step, with its casts, to gain
REPEATS = 10
SIDES = {"cpu": (128, 384, 384), "cuda": (8192, 768, 3072)}  # rows, columns and depth: a CPU may take 15 ms for one


def faster_in_bf16(device: torch.device | str) -> bool:
    """Whether matrix products take less time in bf16 than in float32 on `device`, by 30 % at least. Some 10s of ms."""
    whole, half = seconds(device, torch.float32, torch.bfloat16)
    return whole > WORTH * half


def seconds(device: torch.device | str, *dtypes: torch.dtype) -> list[float]:
    """For each type, the fastest of some products of a transformer's size. They take turns: a machine that is busy for
    a moment is so for all of them."""
    device = torch.device(device)
    tokens, width, hidden = SIDES.get(device.type, SIDES["cpu"])
    pairs = [
        (torch.ones(tokens, width, device=device, dtype=dtype), torch.ones(width, hidden, device=device, dtype=dtype))
        for dtype in dtypes
    ]
    turns = [[_time(*pair) for pair in pairs] for _ in range(1 + REPEATS)]
    return [min(times) for times in zip(*turns[1:], strict=True)]  # the first turn loads libraries


def _time(x: Tensor, weight: Tensor) -> float:
    _wait(x.device)
    start = time.perf_counter()
    torch.mm(x, weight)
    _wait(x.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
