"""A vision transformer of timm that yields Tokens and can hide patches; with the options that every backbone shares.

Convolutional networks are in cnn.py, which builds on this file; backbone.py makes either and loads their weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import PatchDropoutWithIndices, PatchEmbed
from torch import Tensor, nn

from hybridssl import packed
from hybridssl.errors import UserError
from hybridssl.types import Tokens

UNEQUAL = (
    "an encoder of visible patches alone (objectives.pixels.style=mae) needs as many in every view: "
    "set views.mask_probability=1 and a single share, such as views.mask_ratio=[0.75,0.75]"
)


@dataclass(frozen=True)
class BackboneOptions:
    name: str = "vit_small_patch16_224"  # a timm architecture
    args: dict[str, Any] = field(default_factory=dict)  # further arguments of it: embed_dim, depth, patch_size, ...
    registers: int | None = None  # register tokens (Darcet et al., 2309.16588); null: what the architecture has
    image_size: int | None = None  # the size that position embeddings are laid out for; null: views.global_size
    drop_path: float = 0.0  # stochastic depth of the student
    weights: str = (
        ""  # "" from scratch | "pretrained" (timm's own) | exported folder | .safetensors | hub id "org/name"
    )
    pickled: bool = False  # weights may be a .pth of others: read by torch's restricted unpickler, tensors alone
    lora: int = 0  # rank of low-rank updates: the loaded weights rest and these move, to be merged at export; 0: none
    min_match: float = 0.9  # loading fails when fewer of the backbone's tensors are found


@dataclass(frozen=True)
class Crops:
    """Images of one size for a pass of the backbone."""

    images: Tensor  # float [N, C, H, W], normalised, H and W multiples of the patch size
    hidden: Tensor | None = None  # bool [N, P]: patches that it does not see
    left_out: bool = False  # hidden patches are left out (MAE), not replaced by the mask token
    unmasked: int | None = None  # patches that each image shows, where the host knows it; else it looks, and waits


class Backbone(nn.Module):
    """A timm ViT that yields Tokens and can hide patches behind a learned mask token.

    dim: D; patch_size: pixels; prefix: number of tokens (cls + registers) before the patches; packable: crops of
    several sizes can share a pass, and do so while `packed` (benchmarks/packed.py: faster on a CPU too).
    """

    maskable = True
    packable = False
    packed = False
    mask_token: nn.Parameter | None  # None where patches cannot be hidden

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        embed = getattr(model, "patch_embed", None)
        if not isinstance(embed, PatchEmbed) or getattr(model, "cls_token", None) is None:
            raise UserError(f"{type(model).__name__} is not a vision transformer with a class token; try a timm vit_*")
        self.model = model
        self.dim: int = int(model.num_features)  # type: ignore[arg-type]
        self.patch_size: int = int(embed.patch_size[0])
        self.prefix: int = int(model.num_prefix_tokens)  # type: ignore[arg-type]
        self.packable = self.packed = packed.adopt(model)
        self.mask_token = nn.Parameter(torch.zeros(self.dim))
        # The patch embedding is the one place that all of timm's ViTs share, so the mask goes in there.
        self._mask: Tensor | None = None
        embed.register_forward_hook(self._hide)
        # Patches can be left out where timm would drop some at random: after the position embedding.
        self._seen: Tensor | None = None  # [N, V], the patches that go on
        self._droppable = hasattr(model, "patch_drop")
        if self._droppable:
            if model.patch_drop is None:  # EVA; it wants the indices too, for its rotary positions
                model.patch_drop = PatchDropoutWithIndices(0.0)
            model.patch_drop.register_forward_hook(self._leave_out)  # type: ignore[union-attr,operator]

    def _hide(self, module: nn.Module, inputs: Any, patches: Tensor) -> Tensor:
        """patches [N, H, W, D] or [N, P, D] -> the same with masked positions replaced by the mask token."""
        if self._mask is None or self.mask_token is None:
            return patches
        return torch.where(self._mask.view(*patches.shape[:-1], 1), self.mask_token.to(patches.dtype), patches)

    def _leave_out(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Tokens [N, prefix + P, D], or EVA's (tokens, indices) -> the same without the hidden patches."""
        if self._seen is None:
            return output
        tokens = output[0] if isinstance(output, tuple) else output
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        kept = torch.cat([tokens[:, : self.prefix], tokens[:, self.prefix :][rows, self._seen]], dim=1)
        return (kept, self._seen) if isinstance(output, tuple) else kept

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """images: float [N, C, H, W], normalised, H and W multiples of patch_size; mask: bool [N, P], True: hidden."""
        return self.see([Crops(images, mask)])[0]

    def visible(self, images: Tensor, mask: Tensor) -> Tokens:
        """As `forward`, but hidden patches are left out (MAE): `patches` are the others, in the order of the grid.

        Raises UserError when the images do not hide equally many patches, or the architecture cannot leave any out.
        """
        return self.see([Crops(images, mask, left_out=True)])[0]

    def see(self, crops: Sequence[Crops]) -> list[Tokens]:
        """Tokens of crops of several sizes; in one pass over the weights where `packed`, else one after the other."""
        if not self.packed:
            return [one for each in crops for one in self._pass([each])]
        return self._pass(crops)

    def _pass(self, crops: Sequence[Crops]) -> list[Tokens]:
        if self.packable and (len(crops) > 1 or packed.drops(self.model)):
            return [self._tokens(x) for x in packed.run(self.model, [self._embed(one) for one in crops])]
        (one,) = crops
        with self._hiding(one):
            return [self._tokens(self.model.forward_features(one.images))]  # type: ignore[operator]

    def _embed(self, crops: Crops) -> packed.Embedded:
        with self._hiding(crops):
            return packed.embed(self.model, crops.images)

    def _tokens(self, x: Tensor) -> Tokens:
        return Tokens(x[:, 0], x[:, 1 : self.prefix], x[:, self.prefix :])

    @contextmanager
    def _hiding(self, crops: Crops) -> Iterator[None]:
        """What is embedded in here is embedded without the patches that `crops` hides."""
        if crops.left_out and crops.hidden is not None:
            self._seen = self._others(crops.hidden, crops.unmasked)
        else:
            self._mask = crops.hidden
        try:
            yield
        finally:
            self._mask = self._seen = None

    def _others(self, mask: Tensor, unmasked: int | None) -> Tensor:
        """bool [N, P] -> the places [N, V] of the patches that are not hidden."""
        if not self._droppable:
            raise UserError(
                f"{type(self.model).__name__} cannot leave out patches: use views.left_out=0 and "
                "objectives.pixels.style=simmim"
            )
        unmasked = _unmasked(mask) if unmasked is None else unmasked
        return mask.byte().argsort(dim=1, stable=True)[:, :unmasked]


def _unmasked(mask: Tensor) -> int:
    """How many patches each image shows. Raises UserError when they do not show as many."""
    counts = (~mask).sum(dim=1).unique().tolist()
    if len(counts) > 1:
        raise UserError(UNEQUAL)
    return counts[0]
