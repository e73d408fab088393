"""Models parted over processes (FSDP2), for what does not fit on one GPU: each holds a part of every weight.

Gradients and moments are parted with the weights, and the teacher like the student, so that its average is taken part
by part. A transformer block is whole on a device only while it runs, everything else (embeddings, heads, and all of a
convolutional network) while the student does.

torch's `fully_shard`, called here and not by accelerate: there it takes one model with its optimiser, and the teacher
is a second one; and on a CPU accelerate would fall back to DDP without a word, so that no test could see it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hybridssl import dist
from hybridssl.backbone import Backbone


def shard(learner: nn.Module, teacher: nn.Module, device: torch.device) -> None:
    """Part two `Student`s over all processes, in place. They may lie on the CPU until then, never whole on `device`.

    Names of weights stay; their objects do not, so an optimiser comes after. All processes call it. Weights are sent in
    float32 and autocast rounds them, as it does without sharding; its cache would keep them whole, so turn that off.
    """
    mesh = init_device_mesh(device.type, (dist.world_size(),))
    for backbone in _backbones(learner):
        for block in _blocks(backbone):
            fully_shard(block, mesh=mesh)
    fully_shard(learner, mesh=mesh)  # the rest is one unit: all happens in the student's `forward`

    # The teacher's parts are called one by one, so each is a unit of its own, and parted again as soon as it has run.
    for backbone in _backbones(teacher):  # and what anchors hold on to
        for unit in (*_blocks(backbone), backbone):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for objective in teacher.get_submodule("objectives").children():
        fully_shard(objective, mesh=mesh)  # see `gathered`


def _backbones(model: nn.Module) -> list[Backbone]:
    return [part for part in model.modules() if isinstance(part, Backbone)]


def _blocks(backbone: Backbone) -> list[nn.Module]:
    """The transformer blocks; none in a convolutional network."""
    return list(getattr(backbone.model, "blocks", ()))


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """In here sharded modules have their weights whole, to be read, though no `forward` of theirs runs."""
    units = [module for module in modules if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def whole(tensor: Tensor) -> Tensor:
    """`tensor` with the parts of all processes, which all call this; itself where it is not parted."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of `tensor`, in the same memory; `tensor` itself where it is not parted."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor  # type: ignore[return-value]


def like(own: Tensor, value: Tensor) -> Tensor:
    """`value`, whole and the same in all processes, as `own` is: its device, its type, and parted if it is."""
    value = value.to(own.device, own.dtype)
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)  # None: nothing is sent


def load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`model.load_state_dict` of whole tensors. Raises RuntimeError when names or shapes differ."""
    own: dict[str, Any] = model.state_dict()
    model.load_state_dict({name: like(own[name], t) if name in own else t for name, t in tensors.items()})
