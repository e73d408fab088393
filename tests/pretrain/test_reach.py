"""A look at a set at an address fetches a few of its shards; one at a folder reads what it always read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import cv2
import numpy as np
import pytest

from hybridssl import backbone
from pretrain import fingerprint, reach, report_images
from pretrain.columns import columns
from pretrain.command import load
from pretrain.probe import InLoopProbe
from pretrain.reach import within_reach
from shards.build import BuildOptions, build
from shards.index import Index
from shards.mix import Mix

EACH = 8  # images a shard


def folder_of(root: Path, images: int, seed: int = 0) -> Path:
    """Two classes in train and val, an age in the table, EACH images a shard."""
    (root / "images").mkdir(parents=True)
    rows = ["path,label,split,age"]
    for i in range(images):
        pixels = np.random.default_rng([seed, i]).integers(0, 255, (32, 32, 3), np.uint8)
        cv2.imwrite(str(root / "images" / f"{i}.png"), pixels)
        rows.append(f"{i}.png,{'ab'[i % 2]},{('train', 'train', 'val')[i % 3]},{20 + i}")
    (root / "labels.csv").write_text("\n".join(rows))
    build(root / "images", root / "shards", root / "labels.csv", BuildOptions(shard_size=str(EACH)))
    return root / "shards"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("many"), 30 * EACH)


class Far:
    """What an address is to an index: it counts the shards that are fetched."""

    def __init__(self, root: Path, size: int) -> None:
        self.root, self.cache, self.url = root, SimpleNamespace(size=size), "s3://bucket/many"
        self.fetched: list[str] = []

    def open(self, name: str, *_: Any) -> BinaryIO:
        self.fetched.append(name)
        return (self.root / name).open("rb")


def far(folder: Path, shards: int) -> tuple[Index, Far]:
    """The set as at an address, with a cache in whose part for one look so many shards have room."""
    index = Index.open(folder)
    away = Far(folder, reach.PART * shards * max(shard["bytes"] for shard in index.shards))
    index.remote = cast(Any, away)
    return index, away


def shards_of(index: Index, numbers: np.ndarray) -> list[int]:
    return np.unique(np.searchsorted(index.starts, numbers, side="right") - 1).tolist()


def test_a_folder_is_read_as_ever(folder: Path) -> None:
    index = Index.open(folder)
    numbers = index.select(["train"])
    assert within_reach(index, numbers) is numbers
    probe = InLoopProbe(load(["recipe=demo", f"data.train={folder}", "out=o", "probe.images=50"]), index)
    assert np.array_equal(probe.home.train, numbers[:: -(-len(numbers) // 50)])


def test_a_few_shards_are_chosen_evenly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = far(folder, 3)
    numbers = index.select(["train"])
    near = within_reach(index, numbers)
    chosen = shards_of(index, near)
    assert chosen == [5, 15, 25]
    assert np.array_equal(near, [n for n in numbers if shards_of(index, np.array([n]))[0] in chosen])
    assert shards_of(index, within_reach(index, index.select(["val"]))) == chosen  # one fetch serves both splits
    index, _ = far(folder, 0)  # one it must be
    assert shards_of(index, within_reach(index, numbers)) == [15]
    index, _ = far(folder, 1000)
    assert np.array_equal(within_reach(index, numbers), numbers)
    assert len(within_reach(index, numbers[:0])) == 0
    monkeypatch.setattr(reach, "SHARDS", 4)
    assert len(shards_of(index, within_reach(index, numbers))) == 4
    monkeypatch.setattr(reach, "BYTES", 1)
    assert len(shards_of(index, within_reach(index, numbers))) == 1


def test_a_probe_fetches_a_few_shards_again_and_again(folder: Path) -> None:
    recipe = load(["recipe=demo", f"data.train={folder}", "out=o", "views.global_size=32", "views.local_size=16"])
    index, away = far(folder, 3)
    probe = InLoopProbe(recipe, index)
    assert probe.due(recipe.steps)
    args = {"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}
    model = backbone.build(backbone.BackboneOptions("vit_tiny_patch16_224", args), 3, 32).eval()
    found = [probe(model, recipe.steps) for _ in range(2)]
    assert found[0] == found[1]
    assert 0 <= found[0]["probe/linear"] <= 1
    assert len(set(away.fetched)) == 3


def test_the_report_shows_images_of_a_few_shards(folder: Path) -> None:
    index, _ = far(folder, 20)
    selected, words = report_images._select(index, ["train"])
    assert words == "the val split"
    assert 15 < len(shards_of(index, selected)) <= 20


def test_the_doctor_fetches_a_few_shards(folder: Path) -> None:
    index, away = far(folder, 3)
    near, whole = fingerprint.data(index, ["train"]), fingerprint.data(Index.open(folder), ["train"])
    assert len(set(away.fetched)) == 3
    assert (near.images, near.per_class, near.short_side) == (whole.images, whole.per_class, whole.short_side)
    assert near.looked_at < whole.looked_at
    assert np.allclose(near.mean, whole.mean, atol=0.02)


def test_columns_are_the_same_with_any_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They shape the model: a run that goes on with another data.cache_size must find them again."""
    recipe = load(["recipe=demo", f"data.train={folder}", "out=o", "objectives.guide.columns={age: keep}"])
    size = max(shard["bytes"] for shard in Index.open(folder).shards)
    monkeypatch.setattr(reach, "BYTES", 5 * size)
    found = []
    for room in (1, 1000):
        index, away = far(folder, room)
        found.append(columns(recipe, index))
        assert len(set(away.fetched)) == 5
    assert found[0] == found[1]
    assert found[0][0].std > 20


def test_of_a_mix_only_what_is_at_an_address_is_limited(folder: Path, tmp_path: Path) -> None:
    one, two = far(folder, 4)[0], far(folder_of(tmp_path / "two", 20 * EACH, seed=2), 4)[0]
    here = Index.open(folder_of(tmp_path / "here", 3 * EACH, seed=1))
    mix = Mix([one, here, two])
    numbers = mix.select(["train", "val"])
    near = within_reach(mix, numbers)
    parts = [near[(a <= near) & (near < b)] for a, b in zip(mix.bounds, mix.bounds[1:], strict=False)]
    assert len(parts[1]) == len(here)
    assert [len(shards_of(mix, part)) for part in parts] == [2, 3, 2]  # addresses share the room
    assert np.array_equal(near, np.concatenate(parts))
