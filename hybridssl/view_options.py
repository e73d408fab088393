"""How an image becomes views: sizes, colours and masks, as the recipe says them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hybridssl.errors import UserError
from hybridssl.masks import Shape


@dataclass(frozen=True)
class ViewOptions:
    """Crops, colour and masks. The defaults are DINO's (arXiv 2104.14294), for masks DINOv2's; `vflip` is ours."""

    global_size: int = 224  # pixels; a multiple of the patch
    local_size: int = 96  # pixels; a multiple of the patch
    local_count: int = 8  # 0: global views only
    # share of the run, from its start, in which all crops have half their size (FastDINOv2, 2507.03779: 0.75); 0: none
    curriculum: float = 0.0
    global_scale: tuple[float, float] = (0.32, 1.0)  # share of the image's area
    local_scale: tuple[float, float] = (0.05, 0.32)  # the same of local views
    clean_scale: tuple[float, float] = (0.8, 1.0)  # share of the centred square that evaluation sees
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of a crop before it is made square
    hflip: float = 0.5  # probability of left for right
    vflip: float = 0.5  # of up for down: a close-up, a scan or a tile has no up; 0 for X-rays and for people
    jitter: float = 0.8  # probability that colours change, by the four strengths below
    brightness: float = 0.4  # strength s: the factor is drawn from 1 - s .. 1 + s
    contrast: float = 0.4  # strength, likewise
    saturation: float = 0.2  # strength, likewise
    hue: float = 0.1  # strength, in turns of the colour circle
    grayscale: float = 0.2  # probability
    solarize: float = 0.2  # probability, of the second global view only
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)  # probability for the first global view, the second, local views
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    mask_probability: float = 0.5  # share of the global views that are masked
    mask_ratio: tuple[float, float] = (0.1, 0.5)  # share of such a view's patches
    mask_shape: Shape = "block"  # random: single patches (MAE); inverse_block: all but one rectangle (CAPI)
    # share of the patches that the student is not shown at all of global views without a mask; 0: it sees these whole.
    # MSN (2204.07141) leaves out .15 (ViT-S) to .7 (ViT-L)
    left_out: float = 0.0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # per channel, in 0..1; one number serves all channels
    std: tuple[float, ...] = (0.229, 0.224, 0.225)  # likewise

    def __post_init__(self) -> None:
        def need(name: str, good: bool, what: str) -> None:
            if not good:
                raise UserError(f"views.{name}={getattr(self, name)} does not work: {what}")

        for name in ("global_size", "local_size"):
            need(name, getattr(self, name) >= 1, "use a size in pixels")
        need("local_count", self.local_count >= 0, "use 0 or more")
        need("curriculum", 0 <= self.curriculum < 1, "use a share of the run below 1, so that it ends at full size")
        need("left_out", 0 <= self.left_out < 1, "use a share of the patches below 1")
        for name in ("hflip", "vflip", "jitter", "grayscale", "solarize", "mask_probability"):
            need(name, 0 <= getattr(self, name) <= 1, "use a probability, 0 to 1")
        for name in ("brightness", "contrast", "saturation", "hue"):
            need(name, 0 <= getattr(self, name) <= 1, "use a strength, 0 to 1")
        need("blur", len(self.blur) == 3 and all(0 <= p <= 1 for p in self.blur), "use three probabilities, 0 to 1")
        for name in ("global_scale", "local_scale", "clean_scale"):
            low, high = getattr(self, name)
            need(name, 0 < low <= high <= 1, "use two shares of the area, 0 < low <= high <= 1")
        need("mask_ratio", 0 <= self.mask_ratio[0] <= self.mask_ratio[1] <= 1, "use two shares, 0 <= low <= high <= 1")
        for name in ("aspect", "blur_sigma"):
            low, high = getattr(self, name)
            need(name, 0 < low <= high, "use two numbers, 0 < low <= high")
        need("std", min(self.std, default=0) > 0, "use numbers above 0")

    def grid(self, patch: int) -> tuple[int, int]:
        """Rows and columns of patches in a global view. UserError when a crop is no multiple of the patch."""
        for name in ("global_size", "local_size") if self.local_count else ("global_size",):
            value = getattr(self, name)
            if value % patch:
                near = max(round(value / patch), 1) * patch
                raise UserError(f"views.{name}={value} is no multiple of the backbone's patch of {patch}: try {near}")
        return self.global_size // patch, self.global_size // patch

    def halved(self, patch: int) -> ViewOptions:
        """The views while crops are small: half the size, rounded up to whole patches, and half the blur in pixels.

        UserError where a global view would be a single patch, of which nothing can be hidden.
        """

        def half(size: int) -> int:
            return patch * -(-size // (2 * patch))

        if self.global_size <= 2 * patch:
            raise UserError(
                f"views.curriculum={self.curriculum}: half of views.global_size={self.global_size} is a single patch "
                f"of {patch} px: leave the curriculum out (0), or choose larger views or a smaller patch"
            )
        low, high = self.blur_sigma
        return replace(
            self,
            global_size=half(self.global_size),
            local_size=half(self.local_size),
            blur_sigma=(low / 2, high / 2),
        )

    def hides_equally(self, patches: int) -> bool:
        """Whether every global view hides as many of its patches, and any at all."""
        low, high = (round(share * patches) for share in self.mask_ratio)
        return self.mask_probability == 1 and low == high > 0

    def decode_at_least(self) -> int:
        """The short side, in pixels, from which on even the smallest crop of a square image needs no enlarging."""
        sides = [self.global_size / math.sqrt(self.global_scale[0])]
        if self.local_count:
            sides.append(self.local_size / math.sqrt(self.local_scale[0]))
        return math.ceil(max(sides))
