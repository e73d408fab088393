"""Meta columns by name: values in the order asked for, special names, and errors that name the near column."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from finetune.columns import meta_column
from hybridssl.errors import UserError
from shards import scan
from shards.tars import write_tar


@pytest.fixture(scope="module")
def wards(new_index, table):
    """The small index with a ward for every image and an age for every second one."""
    rows = [{**row, "ward": "ABC"[n % 3], "age": str(30 + n) if n % 2 else ""} for n, row in enumerate(table)]
    return new_index(rows), {row["path"]: row for row in rows}


def test_values_come_in_the_order_asked_for(wards):
    index, rows = wards
    numbers = np.random.default_rng(0).permutation(len(index))[:17]
    mine = [rows[index.read(int(n)).meta["path"]] for n in numbers]
    for name in ("ward", "age", "label", "group", "split", "source"):
        found = meta_column(index, numbers, name)
        assert found.dtype.kind == "U"
        assert found.tolist() == [row[name] for row in mine], name


def test_a_second_column_reads_no_shard_again(wards, monkeypatch):
    index, _ = wards
    numbers = np.arange(9)
    meta_column(index, numbers, "ward")
    monkeypatch.setattr(index, "read", lambda number: pytest.fail("read again"))
    assert len(meta_column(index, numbers, "age")) == 9
    assert (meta_column(index, np.arange(len(index)), "source") == "ward").all(), "mapped: read for no sample"


def test_an_unknown_column_names_the_near_one(wards):
    index, _ = wards
    with pytest.raises(UserError, match=r"has a column 'wards'; did you mean 'ward'\? It has source, label"):
        meta_column(index, np.arange(9), "wards")
    with pytest.raises(UserError, match=r"has a column 'scanner'; it has source, .* age"):
        meta_column(index, np.arange(9), "scanner")


def test_a_number_of_a_foreign_tar_has_one_name_and_nan_none(tmp_path):
    image = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    values = [1, 1.0, float("nan"), None, 0.5, "x"]
    rows = [{"label": "a", "grade": value} for value in values]
    write_tar(
        tmp_path / "a.tar",
        ({"__key__": str(n), "png": image, "json": json.dumps(r).encode()} for n, r in enumerate(rows)),
    )
    found = meta_column(scan.write(tmp_path), np.arange(len(rows)), "grade")
    assert found.tolist() == ["1", "1", "", "", "0.5", "x"]


def test_a_pool_without_labels_and_sources_is_empty(new_index, table):
    index = new_index([{**row, "source": "", "label": ""} for row in table[:5]])
    for name in ("source", "label"):
        assert meta_column(index, np.arange(5), name).tolist() == [""] * 5
