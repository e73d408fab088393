"""The nouns that pass between the parts: Batch -> Views -> Tokens. Shapes here, behaviour elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """What a backbone yields for N images, after its final norm."""

    cls: Tensor  # [N, D]
    registers: Tensor  # [N, R, D], R may be 0
    patches: Tensor  # [N, P, D]

    def __getitem__(self, rows: slice) -> Tokens:
        return Tokens(self.cls[rows], self.registers[rows], self.patches[rows])


@dataclass(frozen=True)
class ViewTokens:
    """Tokens of all views of a batch of B images. Views are outermost: row v * B + i is view v of image i."""

    global_: Tokens  # 2B rows
    local: Tokens | None = None  # L * B rows
    clean: Tokens | None = None  # B' rows: as many as the batch has clean views
    views: Views | None = None  # the images that these are the tokens of, where they are at hand
    visible: Tokens | None = None  # 2B rows, the global views again, seen without their hidden patches (MAE)


@dataclass(frozen=True)
class Views:
    """The crops as the model sees them: float, coloured, normalised. Views outermost, as in `ViewTokens`."""

    global_: Tensor  # [2B, C, G, G]
    local: Tensor | None = None  # [L * B, C, g, g]
    clean: Tensor | None = None  # [B', C, G, G]


@dataclass(frozen=True)
class Column:
    """What is known of the values of one column of the table: classes, or a number with its mean and deviation."""

    name: str
    values: tuple[str, ...] = ()  # of a column of classes; empty: numbers
    mean: float = 0.0
    std: float = 1.0

    def encode(self, value: object) -> float:
        """The number of the class, or the standardised number; NaN when it is missing, unknown or no number."""
        if self.values:
            return float(self.values.index(str(value))) if str(value) in self.values else math.nan
        try:
            number = (float(value) - self.mean) / self.std  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return math.nan
        return number if math.isfinite(number) else math.nan


@dataclass(frozen=True)
class Batch:
    """What the loader yields for B images: uint8 crops, and the parameters that `render` turns into Views."""

    global_: Tensor  # uint8 [2, B, C, G, G]
    local: Tensor  # uint8 [L, B, C, g, g], L may be 0
    clean: Tensor  # uint8 [B', C, G, G]: a mild view of the images that need one; B' = 0 when no objective asked for it
    colour: Tensor  # float32 [2 + L, B, Q]: per view and image, drawn in the worker (colour.py); stays on the host
    masks: Tensor  # bool [2, B, P]: patches of the global views that the student does not see
    labels: Tensor  # uint8 [B, K] multi-hot over all classes of all sources; all zero: unlabelled
    source: Tensor  # int64 [B], -1: none
    labelled: (
        Tensor  # bool [B]: a label is known (an all-zero row of a labelled image means "none of its source's classes")
    )
    clean_of: Tensor | None = None  # int64 [B']: the image that each clean view is of; None: one of each, in order
    places: Tensor | None = None  # int64 [M]: see `hidden`
    unmasked: int | None = None  # V: patches that each global view shows, where all show as many and the host knows it
    left_out: Tensor | None = None  # bool [2, B, P]: patches that the student is not shown; none of a masked view
    order: Tensor | None = None  # int64 [2B]: the global views, those that leave patches out last
    short: int = 0  # how many these are
    kept: int = 0  # patches that each of these shows
    meta: Tensor | None = None  # float32 [B, M]: one value a `Column`, NaN where it is missing
    text: list[str] = field(default_factory=list)  # a report or "" per image
    keys: list[str] = field(default_factory=list)
    bad: list[dict] = field(default_factory=list)  # samples that did not decode: key, shard, reason

    def __len__(self) -> int:
        return self.global_.shape[1]

    @property
    def hidden(self) -> Tensor:
        """int64 [M]: where `masks` is True, as numbers of the patches of all global views, view by view."""
        return self.masks.flatten().nonzero()[:, 0] if self.places is None else self.places

    def to(self, device: torch.device | str) -> Batch:
        """All but `colour` on `device`. The host waits for neither this nor, later, what it must know of the masks."""
        self = self.counted()
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "colour"}
        moved = {k: v.to(device, non_blocking=True) for k, v in moved.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:  # the DataLoader calls it by this name
        self = self.counted()  # first, so that this is pinned too
        pinned = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.pin_memory() for k, v in pinned.items() if isinstance(v, Tensor)})

    def counted(self) -> Batch:
        """With `places`, `unmasked` and the order of views, while the masks are still on the host."""
        if self.places is not None:
            return self
        counts = (~self.masks).sum(dim=-1).unique().tolist()
        known = replace(self, places=self.hidden, unmasked=counts[0] if len(counts) == 1 else None)
        if self.left_out is None:
            return known
        missing = self.left_out.flatten(0, 1).sum(dim=1)
        order, short = (missing > 0).byte().argsort(stable=True), int((missing > 0).sum())
        return replace(known, order=order, short=short, kept=self.left_out.shape[2] - int(missing.max()))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, without the host waiting until the device is done with all it was told."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
