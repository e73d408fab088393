"""A small folder of images with a table, and what is built from it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from shards.build import BuildOptions, build
from shards.index import Index


def picture(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    grid = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(seed: int, height: int = 48, width: int = 64) -> bytes:
    return simplejpeg.encode_jpeg(picture(seed, height, width), 90, "RGB", "420")


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="session", name="jpeg")
def _jpeg() -> Callable[..., bytes]:
    return jpeg


@pytest.fixture(scope="session", name="write_table")
def _write_table() -> Callable[..., Path]:
    return write_table


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images in two folders, and `labels.csv` beside them: 3 classes, 2 sources, groups of 2, a third unlabelled."""
    root = tmp_path_factory.mktemp("photos")
    rows = []
    for i in range(60):
        name = f"{'one' if i % 2 else 'two'}/bild {i:02d}.v1 ä.jpg"
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / name).write_bytes(jpeg(i))
        label = "" if i % 3 == 0 else "nevus" if i % 2 else "melanoma" if i % 4 else "melanoma|ulcer"
        rows.append({"path": name, "label": label, "source": "ab"[i % 2], "group": f"p{i // 2}", "age": str(30 + i)})
    write_table(root / "labels.csv", rows)
    return root


@pytest.fixture(scope="session")
def index(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("built") / "set"
    return build(photos / "images", out, photos / "labels.csv", BuildOptions(shard_size="7")).index
