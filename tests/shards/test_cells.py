"""Nothing, whole numbers and text are told apart alike in a sample's json, in CSV and in Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import scan, tallies
from shards.build import build
from shards.errors import DataError
from shards.index import Index
from shards.tars import write_tar


def indexed(folder: Path, rows: list[dict[str, Any]], image: bytes) -> Index:
    """Somebody else's tar, with a sample a row."""
    folder.mkdir()
    samples = [{"__key__": f"k{n}", "jpg": image, "json": json.dumps(row).encode()} for n, row in enumerate(rows)]
    write_tar(folder / "a.tar", samples)
    return scan.write(folder)


def told(index: Index) -> list[tuple[tuple[str, ...], str]]:
    return [((sample := index.read(i)).labels, sample.group) for i in range(len(index))]


def test_cells_of_a_foreign_tar(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    rows = [
        {"label": 3.0, "group": float("nan"), "source": 1.0, "split": float("nan")},
        {"label": 3, "group": 0, "source": 1, "split": "test"},
        {"label": [3.0, "x", None], "group": 0.0},
        {"label": float("nan"), "group": ""},
        {"label": 0, "group": None},
    ]
    index = indexed(tmp_path / "set", rows, jpeg(0))
    assert told(index) == [(("3",), ""), (("3",), "0"), (("3", "x"), "0"), ((), ""), (("0",), "")]
    groups = index.column("group").tolist()
    assert [bool(group) for group in groups] == [False, True, True, False, False]
    assert groups[1] == groups[2]
    assert set(index.sources) == {"1", "default"}
    assert [index.splits[n] for n in index.column("split")] == ["", "test", "", "", ""]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"label": True}, "label is True"),
        ({"label": ["x", 0.5]}, r"label is 0\.5"),
        ({"label": {"name": "x"}}, "label is {'name': 'x'}"),
        ({"group": float("inf")}, "group is inf"),
        ({"group": ["p1"]}, r"group is \['p1'\]"),
        ({"source": False}, "source is False"),
        ({"split": 0.7}, r"split is 0\.7"),
    ],
)
def test_other_cells_are_refused_by_name(
    row: dict[str, Any], says: str, tmp_path: Path, jpeg: Callable[..., bytes]
) -> None:
    with pytest.raises(DataError, match=rf"a\.tar: sample 'k1': its {says}"):
        indexed(tmp_path / "set", [{"label": "x"}, row], jpeg(0))


def test_free_columns_of_a_foreign_tar(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    values = [1, 1.0, float("nan"), None, "", 0.5, "x", True, 0]
    rows = [{"label": "x", "grade": value} for value in values]
    index = indexed(tmp_path / "set", rows, jpeg(0))
    assert tallies.columns(index)["grade"] == ["1", "1", "", "", "", "0.5", "x", "True", "0"]


def test_tables_say_the_same(tmp_path: Path, jpeg: Callable[..., bytes], write_table: Callable[..., Path]) -> None:
    """As programs write a column of numbers with gaps: fractions, and NaN by name where it is text."""
    labels, patients = ["3.0", "nan", "x|4.0"], ["nan", "0.0", "12.0"]
    (tmp_path / "in").mkdir()
    for n in range(3):
        (tmp_path / f"in/{n}.jpg").write_bytes(jpeg(n))
    rows = [{"path": f"{n}.jpg", "label": labels[n], "group": patients[n]} for n in range(3)]
    columns = {"path": [row["path"] for row in rows], "label": [["3.0"], None, ["x", "4.0"]]}
    pq.write_table(pa.table(columns | {"group": [float(patient) for patient in patients]}), tmp_path / "t.parquet")
    for table in (write_table(tmp_path / "t.csv", rows), tmp_path / "t.parquet"):
        index = build(tmp_path / "in", tmp_path / table.suffix[1:], table).index
        assert sorted(told(index)) == [((), "0"), (("3",), ""), (("x", "4"), "12")]
        assert (index.column("group") == 0).sum() == 1
