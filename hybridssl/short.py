"""Global views of which the student sees some patches alone (`views.left_out`), like the anchors of MSN (2204.07141).

What is left out costs nothing, unlike what a mask token stands for. It is done where nobody asks for the patches: in
views without a mask, whose class token is all that the losses read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hybridssl.types import Batch, Tokens
from hybridssl.vit import Crops


def parted(crops: Crops, batch: Batch) -> dict[str, Crops]:
    """Global views, and what lies behind them -> "whole": those that are seen whole, if any; "short": the others."""
    whole, some = _rows(len(crops.images), batch)
    assert batch.left_out is not None
    missing = batch.left_out.flatten(0, 1)[some]
    shortened = Crops(crops.images[some], missing, left_out=True, unmasked=batch.kept)
    if not len(whole):
        return {"short": shortened}
    hidden = None if crops.hidden is None else crops.hidden[whole]
    return {"whole": Crops(crops.images[whole], hidden), "short": shortened}


def joined(seen: Mapping[str, Tokens], batch: Batch) -> Tokens:
    """The tokens of all views in their own order again. Patches of the short ones are zeros: nobody reads them."""
    some = seen["short"]
    cls, registers = [some.cls], [some.registers]
    patches = [some.patches.new_zeros(len(some.cls), batch.masks.shape[2], some.patches.shape[2])]
    if "whole" in seen:
        whole = seen["whole"]
        cls, registers, patches = [whole.cls, *cls], [whole.registers, *registers], [whole.patches, *patches]
    back = torch.cat(_rows(sum(map(len, cls)), batch)).argsort()
    return Tokens(torch.cat(cls)[back], torch.cat(registers)[back], torch.cat(patches)[back])


def _rows(views: int, batch: Batch) -> tuple[Tensor, Tensor]:
    """Numbers of the views of either kind, of `views` in all; those behind the global ones are seen whole."""
    assert batch.order is not None
    first, last = batch.order.split([len(batch.order) - batch.short, batch.short])
    return torch.cat([first, torch.arange(len(batch.order), views, device=first.device)]), last
