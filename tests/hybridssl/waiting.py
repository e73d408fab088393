"""A device that cannot be waited for: torch's meta device, whose tensors have shapes and no values.

Code that makes the host wait for an accelerator asks for a value there (`.item()`, `if tensor.any()`, the number of
places where a mask is True) or copies from plain memory of the host. On the meta device the first fails by itself; the
second is refused in `nowhere_to_wait`. So any step that runs there runs on a GPU without the host waiting for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")

# One kernel for all tensors, which reads its scalars on the device; torch has none for this device.
torch.library.impl("aten::_fused_sgd_", "Meta")(lambda *tensors, **numbers: None)


class Waits(Exception):
    """The host would wait for the device here."""


@contextlib.contextmanager
def nowhere_to_wait() -> Iterator[None]:
    """In here a copy from the host to the meta device must be `non_blocking`. (It stands for a GPU.)"""
    real = torch.autocast

    def autocast(kind: str, *args: Any, **given: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if kind == "meta" else real(kind, *args, **given)  # which knows no meta device

    with mock.patch.object(torch, "autocast", autocast), _Values(), _Copies():
        yield


class _Copies(TorchDispatchMode):
    """Refuses operations between host and device, copies that the host does not wait for excepted."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        tensors = [leaf for leaf in tree_leaves((args, given, out)) if isinstance(leaf, Tensor)]
        sides = {one.device.type for one in tensors if one.ndim or one.device == META}  # a number goes with the kernel
        free = given.get("non_blocking") or (func.overloadpacket is torch.ops.aten.copy_ and True in args[2:])
        if sides == {"cpu", "meta"} and not free:
            raise Waits(f"{func}: {[(str(one.device), tuple(one.shape)) for one in tensors]}")
        if func.overloadpacket in (torch.ops.aten.index_put, torch.ops.aten.index_put_):
            masks = [one for one in args[1] if one is not None and one.dtype in (torch.bool, torch.uint8)]
            if masks and args[2].numel() != 1:  # one value is filled in where the mask is, which needs no count
                raise Waits(f"{func}: with a mask")
        return out


class _Values(TorchFunctionMode):
    """Refuses tensors, and places in tensors, that are made on the device from numbers of the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor) and out.device == META:
            raise Waits(f"{func.__name__}(..., device=...)")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == META:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(one, (list, np.ndarray)) for one in places):
                raise Waits("tensor[list]")
        return out
