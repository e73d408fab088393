"""How a backbone is run. Nothing in here changes what is computed, but for the order of sums."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hybridssl.backbone import Backbone
from hybridssl.cnn import has_running_statistics
from hybridssl.errors import UserError


@dataclass(frozen=True)
class EfficiencyOptions:
    packed: bool = True  # crops of all sizes in one pass over the weights, where the architecture can
    checkpoint: bool = False  # keep a block's input alone and compute the rest again in the backward pass: less memory
    compile: bool = False  # torch.compile of the blocks; the first steps take minutes
    sharded: bool = False  # each process keeps a part of the weights, gradients, moments and teacher (FSDP2), for
    # backbones that do not fit on one GPU; several processes


def apply(backbone: Backbone, options: EfficiencyOptions) -> None:
    """Let `backbone` run so; names of weights stay. Raises UserError for what its architecture cannot."""
    name = type(backbone.model).__name__
    backbone.packed = options.packed and backbone.packable
    if options.checkpoint:
        if has_running_statistics(backbone):  # the second computation would count its batch again
            raise UserError(
                f"efficiency.checkpoint: {name} has batch norms, whose statistics a pass computed twice would change: "
                "leave the key out, and choose a smaller batch.micro or smaller crops"
            )
        try:
            backbone.model.set_grad_checkpointing()  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise UserError(f"efficiency.checkpoint: timm's {name} cannot; leave the key out") from error
    if options.compile:
        blocks = getattr(backbone.model, "blocks", None)
        if not isinstance(blocks, nn.Module):
            raise UserError(f"efficiency.compile: {name} has no blocks to compile; leave the key out")
        for block in blocks.children():
            block.compile()  # in place: what calls the block, and the names of its weights, know nothing of it
