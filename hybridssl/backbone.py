"""The backbone: any timm vision transformer, with a mask token, any image size, and loading that is never silent.

Convolutional networks, which have no tokens to hide, are in cnn.py; `build` gives either.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.layers import PatchDropoutWithIndices, PatchEmbed
from timm.models import adapt_input_conv
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
    lora: int = 0  # rank of low-rank updates: the loaded weights rest and these move, to be merged at export; 0: none
    min_match: float = 0.9  # loading fails when fewer of the backbone's tensors are found


@dataclass(frozen=True)
class Coverage:
    """How much of a backbone a set of weights filled."""

    matched: int
    total: int
    missing: tuple[str, ...]  # the backbone's tensors that keep their fresh values
    unexpected: tuple[str, ...]  # tensors of the file that fit nowhere

    def __str__(self) -> str:
        text = f"{self.matched} of {self.total} backbone tensors loaded"
        for kind, names in (("fresh", self.missing), ("unused", self.unexpected)):
            if names:
                text += f"; {len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        return text


@dataclass(frozen=True)
class Crops:
    """Images of one size for a pass of the backbone."""

    images: Tensor  # float [N, C, H, W], normalised, H and W multiples of the patch size
    hidden: Tensor | None = None  # bool [N, P]: patches that it does not see
    left_out: bool = False  # hidden patches are left out (MAE), not replaced by the mask token


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
            self._seen = self._others(crops.hidden)
        else:
            self._mask = crops.hidden
        try:
            yield
        finally:
            self._mask = self._seen = None

    def _others(self, mask: Tensor) -> Tensor:
        """bool [N, P] -> the places [N, V] of the patches that are not hidden."""
        if not self._droppable:
            raise UserError(f"{type(self.model).__name__} cannot leave out patches: use objectives.pixels.style=simmim")
        seen = ~mask
        counts = seen.sum(dim=1)
        if (counts != counts[0]).any():
            raise UserError(UNEQUAL)
        return seen.nonzero()[:, 1].view(len(mask), int(counts[0]))


def build(options: BackboneOptions, channels: int = 3, image_size: int = 224) -> Backbone:
    """A backbone with fresh weights. Raises UserError for an unknown name (with the nearest ones) or a bad argument."""
    if options.name not in timm.list_models():
        near = difflib.get_close_matches(options.name, timm.list_models(), 3, 0.3)
        raise UserError(f"backbone.name: timm has no '{options.name}'; near: {', '.join(near)}")
    from hybridssl import cnn  # which builds on this file

    if cnn.is_convolutional(options.name):
        return cnn.build(options, channels, image_size)
    args = dict(options.args)
    if options.registers is not None:
        args["reg_tokens"] = options.registers
    size = options.image_size or image_size
    try:
        model = timm.create_model(
            options.name,
            pretrained=False,
            num_classes=0,
            global_pool="token",  # keeps the final norm in forward_features, for architectures that pool by mean too
            in_chans=channels,
            img_size=size,
            dynamic_img_size=True,
            drop_path_rate=options.drop_path,
            **args,
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"timm cannot build {options.name} at {size} px with {args}: {error}") from error
    backbone = Backbone(model)
    if size % backbone.patch_size:
        raise UserError(f"image size {size} is not a multiple of the patch size {backbone.patch_size}")
    return backbone


def load_weights(backbone: Backbone, options: BackboneOptions) -> Coverage:
    """Fill `backbone` from `options.weights`. Position embeddings are resampled to its grid.

    Raises UserError when the source cannot be read, or when less than `options.min_match` of the tensors match.
    """
    state = _read_weights(options)
    fitted = _fit(state, backbone.model)
    own = backbone.model.state_dict()
    good = {name: t for name, t in fitted.items() if name in own and own[name].shape == t.shape}
    coverage = Coverage(
        len(good), len(own), tuple(sorted(own.keys() - good.keys())), tuple(sorted(fitted.keys() - good.keys()))
    )
    if coverage.matched < options.min_match * coverage.total:
        raise UserError(
            f"{options.weights}: only {coverage}. That is below backbone.min_match={options.min_match}: "
            f"is it a {options.name}? (backbone.args must match the weights too)"
        )
    backbone.model.load_state_dict(good, strict=False)
    return coverage


def _read_weights(options: BackboneOptions) -> dict[str, Tensor]:
    source = options.weights
    path = Path(source)
    try:
        if source == "pretrained":
            return timm.create_model(options.name, pretrained=True, num_classes=0).state_dict()
        if path.is_dir():
            return load_file(path / "model.safetensors")
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.exists() or source.count("/") != 1:
            raise UserError(
                f"backbone.weights={source}: neither 'pretrained', a folder with model.safetensors, a .safetensors "
                "file nor a hub id org/name (files that need pickle are not read; convert them to safetensors first)"
            )
        return timm.create_model(f"hf-hub:{source}", pretrained=True, num_classes=0).state_dict()
    except UserError:
        raise
    except Exception as error:  # hub, network and file errors come in a dozen types of four libraries
        raise UserError(
            f"cannot load backbone.weights={source}: {type(error).__name__}: {str(error).splitlines()[0][:200]}. "
            "Give a local folder or file, or check the name and the network"
        ) from error


def _fit(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Foreign names (DINOv2, CLIP) to timm's, position embeddings to the model's grid, both by timm's own filter."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    state = {name.removeprefix("teacher.backbone.model."): tensor for name, tensor in state.items()}
    if isinstance(model, VisionTransformer):
        if "pos_embed" in state and model.pos_embed is not None and not model.no_embed_class:
            state["pos_embed"] = _room_for_registers(state["pos_embed"], model.num_reg_tokens)
        state = checkpoint_filter_fn(state, model)  # type: ignore[assignment]
    about: Any = model.pretrained_cfg
    classifiers = tuple(f"{name}." for name in _listed(about.get("classifier") or "head"))
    for name in _listed(about.get("first_conv") or ()):
        _fit_channels(state, f"{name}.weight", model.state_dict())
    return {name: tensor for name, tensor in state.items() if not name.startswith(classifiers)}


def _listed(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _fit_channels(state: dict[str, Tensor], name: str, own: dict[str, Tensor]) -> None:
    """First layers that saw colour, for images of one channel or of many: their sum, or in turn, as timm does."""
    if name in state and name in own and state[name].shape[1] == 3 != own[name].shape[1]:
        state[name] = adapt_input_conv(own[name].shape[1], state[name])


def _room_for_registers(pos_embed: Tensor, registers: int) -> Tensor:
    """Position embeddings [1, 1 + P, D] of a ViT without registers -> [1, 1 + R + P, D]; others as they are.

    Where class and register tokens share the table of positions, timm takes the first 1 + R rows for them.
    """
    rows = pos_embed.shape[1]
    if not _square(rows - 1) or _square(rows - 1 - registers):
        return pos_embed
    return torch.cat([pos_embed[:, :1], pos_embed.new_zeros(1, registers, pos_embed.shape[2]), pos_embed[:, 1:]], 1)


def _square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
