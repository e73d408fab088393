"""Convolutional backbones (DenseNet, ResNet, ConvNeXt and most of timm's other ones), and what batch norm asks for.

**Batch norm.** The student normalises by the statistics of the crops in hand; the teacher, the probe and the exported
model by running ones. So

- running statistics come from the largest crops of a pass alone: evaluation never sees local ones, which have others;
- the teacher's follow the student's like its weights (`follow_statistics`), for they belong to these weights;
- several GPUs share their batch statistics (`synchronised`); several CPU processes cannot, and share running ones only;
- statistics are those of a micro-batch: here, unlike elsewhere, `batch.micro` changes results: keep it at 32 or more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import timm
import torch
from timm.layers import convert_sync_batchnorm  # torch's own loses the activation inside timm's BatchNormAct2d
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hybridssl.dist import all_reduce_sum, world_size
from hybridssl.errors import UserError
from hybridssl.types import Tokens
from hybridssl.vit import Backbone, BackboneOptions, Crops

M = TypeVar("M", bound=nn.Module)
SIDE = 64  # pixels of the image by which a network's stride is measured


class ConvBackbone(Backbone):
    """A convolutional network of timm that yields Tokens, for images of any size that its stride divides.

    cls        the pooled feature map, as the network's own classifier would be fed
    registers  none, R = 0
    patches    the cells of the last feature map before pooling, row by row; `patch_size` is its stride in pixels. They
               serve what compares places (Gram anchoring, segmentation). None of them can be hidden: a convolution
               sees around a mask, so objectives that mask are refused (`maskable`).
    """

    maskable = False

    def __init__(self, model: nn.Module, channels: int) -> None:
        nn.Module.__init__(self)
        with torch.no_grad():
            cells = model.eval().forward_features(torch.zeros(1, channels, SIDE, SIDE))  # type: ignore[operator]
            pooled = model.forward_head(cells, pre_logits=True)  # type: ignore[operator]
        if cells.ndim != 4 or cells.shape[2] != cells.shape[3] or cells.shape[1] != pooled.shape[-1]:
            raise UserError(
                f"{type(model).__name__} is neither a vision transformer with a class token nor a convolutional "
                "network that pools its last feature map; try a timm vit_*, densenet121, resnet50 or convnext_tiny"
            )
        self.model = model.train()
        self.dim, self.patch_size, self.prefix = pooled.shape[-1], SIDE // cells.shape[-1], 1
        self.mask_token = None

    def see(self, crops: Sequence[Crops]) -> list[Tokens]:
        """Raises ValueError for a mask."""
        if any(one.hidden is not None for one in crops):
            raise ValueError("a convolutional network cannot hide patches")
        largest = max(one.images.shape[-1] for one in crops)
        return [self._look(one.images, one.images.shape[-1] == largest) for one in crops]

    def _look(self, images: Tensor, full_size: bool) -> Tokens:
        with _running_statistics(self.model, full_size):
            cells = self.model.forward_features(images)  # type: ignore[operator]  # [N, D, h, w]
            cls = self.model.forward_head(cells, pre_logits=True)  # type: ignore[operator]
        patches = cells.flatten(2).transpose(1, 2)
        return Tokens(cls, patches[:, :0], patches)


def is_convolutional(name: str) -> bool:
    """Whether timm describes this architecture as a network with a grid to pool and no patch embedding."""
    about = get_pretrained_cfg(name, allow_unregistered=True)
    first = str(getattr(about, "first_conv", None))
    return bool(getattr(about, "pool_size", None)) and "patch_embed" not in first


def build(options: BackboneOptions, channels: int, image_size: int) -> ConvBackbone:
    """The network with fresh weights. image_size: side of the full-size views. Raises UserError."""
    if options.registers:
        raise UserError(f"backbone.registers={options.registers}: {options.name} has no tokens; leave the key out")
    args = dict(options.args)
    if options.drop_path:  # not every network has it
        args["drop_path_rate"] = options.drop_path
    try:
        model = timm.create_model(options.name, pretrained=False, num_classes=0, in_chans=channels, **args)
        backbone = ConvBackbone(model, channels)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"timm cannot build {options.name} with {args}: {error}") from error
    if image_size % backbone.patch_size:
        raise UserError(f"image size {image_size} is not a multiple of {options.name}'s stride {backbone.patch_size}")
    return backbone


def synchronised(model: M, device: torch.device) -> M:
    """`model`, which is to train on `device`, with batch statistics over all GPUs. As it is where there is one process
    or no GPU: torch has no such layer for CPUs."""
    shared = device.type == "cuda" and world_size() > 1
    return convert_sync_batchnorm(model) if shared else model  # type: ignore[return-value]


@torch.no_grad()
def follow_statistics(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Running means and variances of the teacher's batch norms: momentum * own + (1 - momentum) * the student's.

    The student's become the mean over all processes first, so that every process has the same teacher. The first
    1 / (1 - momentum) updates are a plain mean, or the zeros and ones of a fresh network would linger. Does nothing
    where there is no batch norm.
    """
    own = dict(teacher.named_modules())
    pairs = [(own[name], norm) for name, norm in student.named_modules() if _tracks(norm)]
    if not pairs:
        return
    mine, theirs = ([b for pair in pairs for b in (pair[i].running_mean, pair[i].running_var)] for i in (0, 1))
    for norm, _ in pairs:
        norm.num_batches_tracked += 1  # type: ignore[operator]  # the teacher's counts updates; it never trains
    share = pairs[0][0].num_batches_tracked.reciprocal().clamp_min(1 - momentum)  # type: ignore[union-attr, operator]
    student_now = all_reduce_sum(torch.cat(theirs)) / world_size()  # type: ignore[arg-type]
    teacher_now = torch.cat(mine).lerp(student_now, share)  # type: ignore[arg-type]
    for buffers, values in ((theirs, student_now), (mine, teacher_now)):
        torch._foreach_copy_(buffers, list(values.split([len(b) for b in buffers])))  # type: ignore[arg-type]


def has_running_statistics(model: nn.Module) -> bool:
    return any(_tracks(module) for module in model.modules())


def _tracks(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


@contextmanager
def _running_statistics(model: nn.Module, taken: bool) -> Iterator[None]:
    """In here training passes add to the running statistics, or (not `taken`) leave them alone."""
    norms = [] if taken or not model.training else [m for m in model.modules() if _tracks(m)]
    for norm in norms:
        norm.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True  # type: ignore[assignment]
