"""The pictures of the audit's page: thumbnails with what is known of them, those of one group side by side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import cv2

from hybridssl.page import Markup, Page, inline, picture
from hybridssl.pictures import jpeg
from shards.errors import DataError
from shards.format import decode
from shards.index import Index

PICTURE, QUALITY = 112, 75  # longest side in pixels and JPEG quality: 3 to 5 KB a picture
A_GROUP = 6  # pictures of a group that are shown
TILE, ACROSS = 300, 3  # px of a group on the page, and pictures side by side in it
LARGEST = 150  # px of a picture on the page: more would only show its JPEG
HOW = {"bytes": "same bytes", "pixels": "same pixels", "near": "near"}


class Pictures:
    """The pictures of an index, by key or by number, each with its caption."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.numbers = {index.key(i): i for i in range(len(index))}

    def of_key(self, key: str, split: str = "", more: str = "") -> Markup:
        return cell(self.index, self.numbers[key], split, more)

    def of_group(self, group: dict[str, Any]) -> list[Markup]:
        """Copies as audit.json lists them, the one to keep first."""
        rows = list(zip(group["keys"], group["splits"], strict=True))[:A_GROUP]
        cells = [self.of_key(key, split, how(group) if n else "kept") for n, (key, split) in enumerate(rows)]
        left = len(group["keys"]) - len(cells)
        return [*cells, Markup(f"<figure>and {left:,} more</figure>")] if left else cells


def cell(index: Index, number: int, *words: str) -> Markup:
    """A picture, its labels, some words, and its key. What does not decode is a line of text."""
    try:
        image = decode(index.read(number).image, PICTURE, index.channels)
        shown = picture(_small(image))
    except DataError:
        shown = Markup("<p>unreadable</p>")
    labels = "|".join(index.labels(number)) or "unlabelled"
    lines = [f"<b>{inline(labels)}</b>", *map(inline, words), inline(index.key(number))]
    return Markup(f"<figure>{shown}<figcaption>{'<br>'.join(filter(None, lines))}</figcaption></figure>")


def how(found: dict[str, Any]) -> str:
    """How sure it is that two pictures are one."""
    return f"near, {found['agreement']:.2f}" if found["how"] == "near" else HOW[found["how"]]


def show(page: Page, groups: Iterable[list[Markup]]) -> None:
    """Each group as a tile: three or four in a row of a wide page, one below the other on a phone."""
    groups = list(groups)
    single = all(len(cells) == 1 for cells in groups)
    page.figures([(_tile(cells), "") for cells in groups], width=TILE // 2 if single else TILE)


def _tile(cells: list[Markup]) -> Markup:
    style = f"--columns:{min(len(cells), ACROSS)};--w:{TILE // (ACROSS + 1)}px;--most:{LARGEST}px"
    return Markup(f'<div class="images" style="{style}">{"".join(cells)}</div>')


def _small(image: Any) -> bytes:
    """uint8 [H, W, C] -> a small JPEG of all of it, rims and all; of other than 3 channels, the first ones."""
    scale = PICTURE / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    planes = image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2)
    small = cv2.resize(planes.copy(), size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    return jpeg(small, QUALITY)
