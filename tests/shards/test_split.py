"""A patient stays on one side; images that come later move no one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.__main__ import main
from shards.build import build
from shards.errors import DataError
from shards.options import BuildOptions
from shards.split import crossing, parse_split, stratified

PARTS = parse_split("70/10/20")


def drawn(patients: int, classes: int = 3) -> tuple[list[str], list[tuple[str, ...]]]:
    """Patients of 1 to 3 images; class k is twice as rare as class k - 1."""
    units, labels = [], []
    for i in range(patients):
        kind = next((k for k in range(classes - 1, 0, -1) if i % 2**k == 0), 0)
        units += [f"p{i}"] * (1 + i % 3)
        labels += [(f"c{kind}",)] * (1 + i % 3)
    return units, labels


def test_every_class_is_divided_to_within_one_patient() -> None:
    units, labels = drawn(83)
    splits = stratified(units, labels, PARTS)
    of = dict(zip(units, splits, strict=True))
    assert [of[unit] for unit in units] == splits  # all images of a patient in one
    kinds = dict(zip(units, labels, strict=True))
    for kind in {names[0] for names in labels}:
        members = [unit for unit in kinds if kinds[unit] == (kind,)]
        counts = Counter(of[unit] for unit in members)
        assert all(abs(counts[name] - share * len(members)) <= 1 for name, share in PARTS)


def test_a_patient_counts_for_the_rarest_class() -> None:
    units = [f"p{i}" for i in range(40)]
    labels = [("common", "rare") if i < 10 else ("common",) for i in range(40)]
    splits = stratified(units, labels, parse_split("50/50"))
    assert Counter(splits[:10]) == {"train": 5, "test": 5}


def test_kept_patients_stay_and_new_ones_fill_what_is_short() -> None:
    units, labels = drawn(60)
    first = dict(zip(units, stratified(units, labels, PARTS), strict=True))
    more, kinds = drawn(120)
    second = dict(zip(more, stratified(more, kinds, PARTS, kept=first), strict=True))
    assert all(second[unit] == split for unit, split in first.items())
    counts = Counter(second.values())
    assert all(abs(counts[name] / 120 - share) < 0.03 for name, share in PARTS)


def test_stratified_build_then_a_larger_one(
    tmp_path: Path, jpeg: Callable[..., bytes], write_table: Callable[..., Path]
) -> None:
    images = tmp_path / "images"
    images.mkdir()

    def make(count: int, out: str, **options: object) -> dict[str, str]:
        rows = []
        for i in range(count):
            (images / f"{i}.jpg").write_bytes(jpeg(i, 8, 8))
            rows.append({"path": f"{i}.jpg", "label": "ab"[i % 4 == 0], "patient": f"p{i // 2}"})
        table = write_table(tmp_path / "t.csv", rows)
        chosen = BuildOptions({"group": "patient"}, split="50/50", stratify=True, **options)
        index = build(images, tmp_path / out, table, chosen).index
        return {(sample := index.read(i)).group: sample.split for i in range(len(index))}

    first = make(24, "first")
    assert Counter(first.values()) == {"train": 6, "test": 6}
    second = make(40, "second", keep_splits=str(tmp_path / "first"))
    assert all(second[group] == split for group, split in first.items())
    assert Counter(second.values()) == {"train": 10, "test": 10}
    with pytest.raises(DataError, match="add for example --split 70/10/20"):
        BuildOptions(stratify=True)
    with pytest.raises(DataError, match="--keep-splits goes with --stratify"):
        BuildOptions(split="50/50", keep_splits=str(tmp_path / "first"))


@pytest.mark.parametrize("how", [[], ["--stratify"]])
def test_a_split_of_the_table_that_is_overridden_is_told(
    how: list[str], tmp_path: Path, jpeg: Callable[..., bytes], write_table: Callable[..., Path], capsys
) -> None:
    (tmp_path / "images").mkdir()
    rows = [{"path": f"{i}.jpg", "label": "ab"[i % 2], "split": "test" if i < 5 else ""} for i in range(12)]
    for i in range(12):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(jpeg(i, 8, 8))
    table = write_table(tmp_path / "t.csv", rows)
    words = ["build", "--images", str(tmp_path / "images"), "--table", str(table), "--out"]
    assert main([*words, str(tmp_path / "kept")]) == 0
    assert "a split of their own" not in capsys.readouterr().out
    assert main([*words, str(tmp_path / "drawn"), "--split", "50/50", *how]) == 0
    assert "5 images had a split of their own, which --split 50/50 overrides" in capsys.readouterr().out


def test_without_a_value_of_the_column_a_patient_stays_together(
    tmp_path: Path, jpeg: Callable[..., bytes], write_table: Callable[..., Path]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    rows = [{"path": f"{i}.jpg", "patient": f"p{i // 3}", "family": "f" if i >= 30 else ""} for i in range(60)]
    for i in range(60):
        (images / f"{i}.jpg").write_bytes(jpeg(i, 8, 8))
    table = write_table(tmp_path / "t.csv", rows)
    index = build(images, tmp_path / "out", table, BuildOptions({"group": "patient"}, split="50/50", by="family")).index
    found: dict[str, set[str]] = {}
    for sample in (index.read(i) for i in range(len(index))):
        found.setdefault(sample.group, set()).add(sample.split)
    assert all(len(splits) == 1 for splits in found.values())
    assert len(set().union(*found.values())) == 2


def test_pages_stay_in_the_split_of_their_file(tmp_path: Path) -> None:
    """Without a group, the pages of a file have its name for one."""
    (tmp_path / "in").mkdir()

    def make(count: int, out: str, **options: object) -> dict[str, set[str]]:
        for n in range(count):
            pages = [Image.fromarray(np.full((8, 8), 40 * n + page, np.uint16)) for page in range(2)]
            pages[0].save(tmp_path / f"in/{n}.tif", save_all=True, append_images=pages[1:])
        chosen = BuildOptions(split="50/50", stratify=True, **options)
        index = build(tmp_path / "in", tmp_path / out, options=chosen).index
        assert len(index) == 2 * count
        found: dict[str, set[str]] = {}
        for i in range(len(index)):
            found.setdefault(index.meta(i)["path"], set()).add(index.splits[int(index.column("split")[i])])
        return found

    first = make(10, "first")
    assert all(len(splits) == 1 for splits in first.values())
    second = make(30, "second", keep_splits=str(tmp_path / "first"))
    assert {path: second[path] for path in first} == first


def test_what_has_no_split_lies_on_the_side_of_train() -> None:
    values = np.array([7, 7, 8, 8, 9, 9, 5, 5, 5, 0, 0])
    split = np.array([0, 1, 0, 3, 2, 3, 1, 1, 0, 1, 3], np.int8)
    assert crossing(values, split).tolist() == [8, 9]
    assert crossing(values[:0], split[:0]).tolist() == []
