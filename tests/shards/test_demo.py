from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from shards.demo import generate
from shards.draw import CLASSES, SITES
from shards.errors import DataError
from shards.format import decode, decode_mask
from shards.index import Index
from shards.stats import stats


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return generate(tmp_path_factory.mktemp("demo") / "set", samples=320, size=48)


def test_the_set_has_what_a_real_one_has(demo: Index) -> None:
    found = stats(demo)
    assert demo.synthetic
    assert demo.classes == tuple(sorted(CLASSES))
    assert demo.sources == tuple(SITES)
    assert found.masks == found.texts == len(demo) == 320
    assert not any("more than one split" in warning for warning in found.warnings)
    shares = {split: count / 320 for split, count in found.splits.items()}
    assert shares == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.06)
    samples = [demo.read(i) for i in range(320)]
    assert {sample.meta["skin_tone"] for sample in samples} == {"I", "II", "III", "IV", "V", "VI"}
    train = [sample for sample in samples if sample.split == "train"]
    assert np.mean([not sample.labels for sample in train]) == pytest.approx(0.5, abs=0.1)
    by_group = {sample.group: [] for sample in train}
    for sample in train:
        by_group[sample.group].append(bool(sample.labels))
    assert all(len(set(known)) == 1 for known in by_group.values())  # withheld by patient
    assert all(sample.labels for sample in samples if sample.split != "train")
    assert not any("consistent with" in (sample.text or "") for sample in samples if not sample.labels)


def test_masks_lie_on_the_lesion(demo: Index) -> None:
    darker = []
    for i in range(0, 320, 8):
        sample = demo.read(i)
        image = decode(sample.image).astype(float).mean(2)
        mask = decode_mask(sample.mask or b"")
        assert mask.shape == image.shape == (48, 48)
        assert 0.05 < mask.mean() < 0.7
        centre = np.hypot(*(np.mgrid[0:48, 0:48] - 23.5)) < 22  # the corners may be dark
        darker.append(image[mask].mean() < image[~mask & centre].mean())
    assert np.mean(darker) > 0.85


def test_the_same_seed_draws_the_same_and_less_is_the_beginning(demo: Index, tmp_path: Path) -> None:
    part = generate(tmp_path / "part", samples=60, size=48)
    assert all(part.read(i) == demo.read(i) for i in range(60))
    other = generate(tmp_path / "other", samples=60, size=48, seed=1)
    assert part.read(0).image != other.read(0).image


def test_class_table(demo: Index) -> None:
    with (demo.root / "classes.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["class"] for row in rows} == set(demo.classes)
    assert all(row["name"] and row["definition"] and len(row["synonyms"].split("|")) >= 2 for row in rows)


def test_numbers_that_make_no_sense(tmp_path: Path) -> None:
    for bad in ({"samples": 3}, {"size": 8}, {"withheld": 1.0}, {"seed": -1}):
        with pytest.raises(DataError, match="needed are 40 or more samples"):
            generate(tmp_path / "out", **bad)
    assert not list(tmp_path.iterdir())
