"""Talking to the other processes. Every call is a plain no-op when there is only this one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_alone = False


def cores() -> int:
    """CPU cores that this process may use: a scheduler may have given it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _several() -> bool:
    return not _alone and dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In here this process talks to no other: for a trial that may fail on one of them."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def rank() -> int:
    return dist.get_rank() if _several() else 0


def world_size() -> int:
    return dist.get_world_size() if _several() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all processes. A new tensor, outside the autograd graph where there are several."""
    return _all_reduce(tensor, "SUM")


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Elementwise maximum of `tensor` over all processes."""
    return _all_reduce(tensor, "MAX")


def all_gather(tensor: Tensor) -> Tensor:
    """`tensor` [n, ...] of every process, in their order: [world * n, ...]. n is the same on each; no gradient."""
    if not _several():
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def gather_objects(mine: Any) -> list[Any]:
    """What every process gives, in their order. For small things, and rarely: the host waits."""
    if not _several():
        return [mine]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, mine)
    return found


def of_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them. For small things, and rarely: the host waits."""
    return gather_objects(make() if rank() == 0 else None)[0]


def all_agree(mine: bool) -> bool:
    """True where every process says True: decide together, or one of them waits for ever."""
    device = "cuda" if _several() and dist.get_backend() == "nccl" else "cpu"
    return not all_reduce_max(torch.tensor(int(not mine), device=device)).item()


def _all_reduce(tensor: Tensor, operation: str) -> Tensor:
    if not _several():
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format)  # NCCL takes no other
    dist.all_reduce(total, getattr(dist.ReduceOp, operation))
    return total
