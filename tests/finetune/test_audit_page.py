"""`python -m shards audit` from its door to its page: escaped, self-contained, bounded, with features on request."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from finetune import audit_page, audit_pictures
from shards.__main__ import main
from shards.build import build
from shards.options import BuildOptions
from tests.finetune.looked import without_pictures

HOSTILE = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images, each twice in another size and once mirrored; the copies in test, with another, hostile label."""
    root = tmp_path_factory.mktemp("set")
    (root / "images").mkdir()
    rows = []
    for n in range(20):
        grid = np.random.default_rng(n).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        image = cv2.resize(grid, (128, 96), interpolation=cv2.INTER_CUBIC)
        for name, copy in (("a", image), ("b", image[::2, ::2]), ("c", image[:, ::-1])):
            path = root / "images" / f"{n:02d}{name}.jpg"
            path.write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(copy), 90, "RGB", "420"))
            label, split = ("naevus", "train") if name == "a" else (HOSTILE, "test")
            rows.append({"path": path.name, "label": label, "split": split, HOSTILE: f"{HOSTILE}{n % 2}"})
    with (root / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    build(root / "images", root / "shards", root / "table.csv", BuildOptions())
    return root / "shards"


def test_from_the_door_to_the_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(folder), "--against", str(folder), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    document = json.loads((tmp_path / "audit.json").read_text())
    page = (tmp_path / "audit.html").read_text()
    assert len(document["drop"]) == 40
    assert len(document["leaks"]) == 60
    assert "40 of 60 images are redundant copies" in said
    assert f"stream.exclude={tmp_path / 'audit.json'} out=" in said
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in without_pictures(page).replace("http-equiv", "")
    most = 2 * audit_page.GROUPS + 3 * audit_page.GROUPS * audit_pictures.A_GROUP + audit_page.SINGLE
    assert 0 < page.count("<img") <= most
    assert len(page) < 1_500_000


def test_a_histogram_may_suggest_and_an_unknown_backbone_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYBRIDSSL_CACHE", str(tmp_path / "cache"))
    assert main(["audit", str(folder), "--backbone", "histogram", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "audit.json").read_text())["features"] is True
    capsys.readouterr()
    assert main(["audit", str(folder), "--backbone", "nowhere", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: no backbone 'nowhere'")


@pytest.mark.parametrize(
    ("names", "text"),
    [(["a"], "a"), (["a", "b"], "a and b"), (list("abcdef"), "a, b, c, d and 2 more")],
)
def test_lists_read_as_english(names: list[str], text: str) -> None:
    assert audit_page._listed(names) == text


@pytest.mark.parametrize(
    ("number", "words"),
    [(1, "1 of 9 images is a redundant copy; 1 image cannot be read"), (2, "2 of 9 images are redundant copies")],
)
def test_the_answer_counts_in_english(number: int, words: str) -> None:
    findings = {
        "duplicates": [{"across_splits": False, "label_conflict": False}] * number,
        "unreadable": [{}] * (2 - number),
        "groups_across_splits": [],
        "against": [],
        "confounding": [],
    }
    document = {"findings": findings, "drop": ["k"] * number, "index": {"samples": 9}}
    assert audit_page.answer(document) == words + "."
