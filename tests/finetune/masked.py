"""Images for the tests of segmentation: a disc that differs from its ground by colour, with the mask of it."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np

from shards.build import build
from shards.index import Index

SPLITS = {"train": 20, "val": 6, "test": 10}  # groups
GROUND, DISC, RIM = (70, 90, 170), (180, 80, 70), (80, 170, 80)


def draw(rng: np.random.Generator, size: int = 64, rim: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(image uint8 [S, S, 3], mask uint8 [S, S]): 1 in the disc and, with `rim`, 2 in a ring around it."""
    y, x = np.mgrid[:size, :size]
    centre, radius = rng.uniform(0.3, 0.7, 2) * size, rng.uniform(0.18, 0.3) * size
    distance = np.hypot(y - centre[0], x - centre[1])
    mask = (distance < radius).astype(np.uint8)
    if rim:
        mask[(distance >= radius) & (distance < 1.6 * radius)] = 2
    image = np.array([GROUND, DISC, RIM], dtype=float)[mask] * rng.uniform(0.7, 1.2)  # brightness tells nothing
    return np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8), mask


def make(folder: Path, rim: bool = False, without: int = 0, seed: int = 0) -> Index:
    """Shards of such images, one or two a group; the first `without` test images have no mask."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    rows = []
    for split, count in SPLITS.items():
        for g in range(count):
            for i in range(1 + g % 2):
                name = f"{split}-{g}-{i}"
                image, mask = draw(rng, rim=rim)
                cv2.imwrite(str(folder / "images" / f"{name}.png"), image[..., ::-1])
                cv2.imwrite(str(folder / f"{name}.png"), mask)
                bare = split == "test" and sum(row["split"] == "test" for row in rows) < without
                at = "" if bare else f"{name}.png"
                rows.append({"path": f"{name}.png", "split": split, "group": f"{split}-{g}", "mask": at})
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return build(folder / "images", folder / "shards", folder / "table.csv").index
