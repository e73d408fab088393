"""A small index whose classes differ in colour, a run folder and its export, and a cache of their own."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from hybridssl import checkpoint, run
from hybridssl.backbone import Backbone, BackboneOptions, build
from hybridssl.export import export
from hybridssl.recipe import to_dict
from shards.build import build as build_shards
from shards.index import Index

COLOURS = {"blue": (60, 70, 160), "brown": (120, 90, 60), "red": (170, 70, 70)}
SPLITS = {"train": 14, "val": 8, "test": 10}  # groups a class
TINY = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Features of the tests never meet those of the user."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("HYBRIDSSL_CACHE", str(folder))
        yield folder / "features"


def rows(seed: int = 0, splits: dict[str, int] | None = None) -> list[dict[str, str]]:
    """One row an image: one to three images a group, `splits` groups a class."""
    rng = np.random.default_rng(seed)
    out = []
    for split, count in (splits or SPLITS).items():
        for label in COLOURS:
            for g in range(count):
                group = f"{split}-{label}-{g}"
                out += [
                    {"path": f"{group}-{i}.png", "label": label, "split": split, "group": group, "source": "ward"}
                    for i in range(rng.integers(1, 4))
                ]
    return out


def make_index(folder: Path, table: list[dict[str, str]]) -> Index:
    """Images of noise around their class's colour, which a group shifts; the picture depends on the file name only."""
    images = folder / "images"
    images.mkdir(parents=True)
    for row in table:
        seed = [ord(c) for c in row["path"]]
        rng, own = np.random.default_rng(seed), np.random.default_rng(seed[:-5])
        colour = np.array(COLOURS[row["path"].split("-")[1]]) + own.normal(0, 30, 3)
        pixels = np.clip(colour + rng.normal(0, 20, (40, 48, 3)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(images / row["path"]), pixels[..., ::-1])
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    return build_shards(images, folder / "shards", folder / "table.csv").index


@pytest.fixture(scope="session")
def new_index(tmp_path_factory) -> Callable[[list[dict[str, str]]], Index]:
    return lambda table: make_index(tmp_path_factory.mktemp("index"), table)


@pytest.fixture(scope="session")
def table() -> list[dict[str, str]]:
    return rows()


@pytest.fixture(scope="session")
def index(new_index, table) -> Index:
    return new_index(table)


class _Holder(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """A run of one checkpoint, written by the program that trains."""
    options = BackboneOptions(name="vit_tiny_patch16_224", args=TINY, registers=2)
    torch.manual_seed(1)
    student, teacher = _Holder(build(options, 3, 32)), _Holder(build(options, 3, 32))
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.2)
    about = {"options": to_dict(options), "channels": 3, "image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    data = {"index": "i", "index_sha256": "s", "splits": ["train"], "samples": 1, "sources": [], "classes": []}
    state = run.RunState(3, 96, {"seed": 0}, about, {**data, "synthetic": True})
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    checkpoint.save(folder, state, student, teacher, torch.optim.AdamW(student.parameters()))
    return folder


@pytest.fixture(scope="session")
def export_folder(run_folder) -> Path:
    out = run_folder.parent / "exported"
    export(run_folder, out)
    return out
