"""Tables that people open in a spreadsheet: nothing in them runs, and nothing is lost on the way back."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.build import build, write_linkage
from shards.options import BuildOptions
from shards.spreadsheet import STARTS, restored, safe

FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", '=HYPERLINK("x")', "-"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_becomes_text(text: str) -> None:
    assert safe(text) == f"'{text}"


@pytest.mark.parametrize(
    "value", ["-0.5", "+3", "-1e-05", "-1,5", "a=b", "melanoma", "", "'quoted", -0.5, 3, None, True]
)
def test_numbers_and_plain_text_stay(value: object) -> None:
    assert safe(value) is value


@given(st.text(alphabet=[*STARTS, "'", "1", ".", "e", "a", " "], max_size=6))
def test_what_is_written_is_read_back(text: str) -> None:
    written = safe(text)
    assert isinstance(written, str)
    assert restored(written) == text
    if written.startswith(STARTS):
        float(written)  # a number


def test_a_table_is_read_as_it_was_before_it_was_made_safe(tmp_path: Path, write_table: Callable[..., Path]) -> None:
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in/a.png"), np.zeros((40, 40, 3), np.uint8))
    said = {"label": "=nevus", "source": "@ward", "group": "-7-b", "note": "'=quoted", "depth": "-0.5", "who": "'tis"}
    table = write_table(tmp_path / "t.csv", [{"path": "a.png", **{k: str(safe(v)) for k, v in said.items()}}])
    sample = build(tmp_path / "in", tmp_path / "out", table).index.read(0)
    assert (sample.labels, sample.source, sample.group) == (("=nevus",), "@ward", "-7-b")
    assert {name: sample.meta[name] for name in ("note", "depth", "who")} == {
        name: said[name] for name in ("note", "depth", "who")
    }


def test_paths_of_the_linkage_do_not_run(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in/=1+1.png"), np.zeros((40, 40, 3), np.uint8))
    write_linkage(tmp_path / "linkage.csv", tmp_path / "in", None, BuildOptions(salt="0123456789abcdef"))
    with (tmp_path / "linkage.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["path"] == "'=1+1.png"
    assert restored(row["path"]) == "=1+1.png"
