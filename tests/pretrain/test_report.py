"""The report of a real, tiny run: every section, and what happens when a part of the run is missing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hybridssl import text
from hybridssl.backbone import BackboneOptions, build
from hybridssl.errors import UserError
from hybridssl.page import Page
from pretrain import pictures, report, report_images
from pretrain.loop import main
from pretrain.pictures import Gallery, Lens
from shards.build import build as build_shards
from shards.errors import DataError
from shards.index import Index
from tests.hybridssl.conftest import tiny_encoder
from tests.pretrain.conftest import TINY

PICTURES = ["Map of the embeddings", "Nearest neighbours", "Inside the image"]
CURVES = ["Losses", "Health", "Probe over time"]
ALL = [*CURVES, *PICTURES, "Class prototypes", "Schedules and speed"]


@pytest.fixture(scope="module")
def finished(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main([*TINY, "probe.every=2", f"data.train={index}", f"out={out}"]) == 0
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def sections(html: str) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", html)


def html_of(run: Path, data: Path | None = None) -> str:
    return report.write(run, data).read_text(encoding="utf-8")


def test_every_section_is_there_and_the_file_stands_alone(run: Path) -> None:
    html = html_of(run)
    assert sections(html) == ALL
    assert len(html) < 3_000_000
    assert not re.search(r"https?:|<script|\bnan\b", re.sub(r"base64,[\w+/]+", "", html))  # which may spell any word
    assert "synthetic" in html
    for words in ("ln K", "By class", "By source", "untrained backbone", "At the start", "dino", "ibot", "labels"):
        assert words in html
    assert html.count("data:image/jpeg") >= 6 * 7 + 6


def test_the_same_run_gives_the_same_report(run: Path) -> None:
    assert html_of(run) == html_of(run)


@pytest.mark.parametrize(
    ("lost", "kept"),
    [
        ("metrics.jsonl", [*PICTURES, "Class prototypes"]),
        ("checkpoints", [*CURVES, "Schedules and speed"]),
        ("prototypes.safetensors", ALL),
    ],
)
def test_a_lost_part_costs_its_sections_only(run: Path, lost: str, kept: list[str]) -> None:
    path = run / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    html = html_of(run)
    assert sections(html) == kept
    assert ("holds no checkpoint" in html) == (lost == "checkpoints")
    assert ("Nothing has been logged" in html) == (lost == "metrics.jsonl")


def test_without_the_shards_the_curves_remain(run: Path, tmp_path: Path) -> None:
    html = html_of(run, tmp_path / "gone")
    assert sections(html) == [*CURVES, "Class prototypes", "Schedules and speed"]
    assert "left out" in html
    assert "no index.json" in html


def small_index(folder: Path, labels: list[str], count: int = 24) -> Path:
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = ["path,label,source"]
    for i in range(count):
        cv2.imwrite(str(folder / "images" / f"{i:02}.png"), rng.integers(0, 255, (40, 50, 3), dtype=np.uint8))
        rows.append(f"{i:02}.png,{labels[i % len(labels)]},<i>clinic</i>")
    (folder / "table.csv").write_text("\n".join(rows))
    build_shards(folder / "images", folder / "shards", folder / "table.csv")
    return folder / "shards"


def test_names_from_the_data_are_escaped(run: Path, tmp_path: Path) -> None:
    html = html_of(run, small_index(tmp_path, ["<script>alert(1)</script>", "plain"]))
    assert "&lt;script&gt;alert(1)" in html
    assert "<script" not in html
    assert "<i>" not in html


def test_images_without_labels_have_pictures_too(run: Path, tmp_path: Path) -> None:
    html = html_of(run, small_index(tmp_path, [""]))
    assert [s for s in sections(html) if s in PICTURES] == PICTURES
    assert "By class" not in html
    assert "by chance" not in html


def test_too_few_images_are_named_as_the_reason(run: Path, tmp_path: Path) -> None:
    html = html_of(run, small_index(tmp_path, ["a"], count=5))
    assert "only 5 images" in html
    assert not set(PICTURES) & set(sections(html))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_merged_by_step_and_a_torn_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "a": 1}\n{"step": 1, "a": 0}\n{"step": 2, "b": NaN}\n{"step": 3, "a"')
    first, second = report.read_metrics(path)
    assert first == {"step": 1, "a": 0}
    assert second["a"] == 1
    assert np.isnan(second["b"])


WELL = {"loss/dino": 3.0, "health/target_entropy": 2.0, "health/max_entropy": 4.0, "health/prototype_usage": 0.7}


@pytest.mark.parametrize(
    ("change", "tone", "words"),
    [
        ({}, "good", "50%"),
        ({"loss/dino": float("nan")}, "bad", "no longer finite"),
        ({"skipped": 3, "loss/dino": float("nan")}, "bad", "gradients"),
        ({"health/prototype_usage": 0.01}, "bad", "Collapsed"),
        ({"health/target_entropy": 3.99}, "warn", "close to uniform"),
        ({"health/rankme": 10.0}, "warn", "from 90 to 10"),
    ],
)
def test_verdict(change: dict, tone: str, words: str) -> None:
    lines = [{"step": 1, **WELL, "health/rankme": 90.0}, *({"step": i, **WELL, **change} for i in range(2, 30))]
    got, sentence = report.verdict(lines)
    assert got == tone, sentence
    assert words in sentence


def test_verdict_of_nothing() -> None:
    assert report.verdict([])[0] == "quiet"


def test_duration() -> None:
    assert [report.duration(s) for s in (12, 125, 3725)] == ["12 s", "2 min", "1 h 02 min"]


@pytest.fixture
def lens() -> Lens:
    torch.manual_seed(0)
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
    backbone = build(BackboneOptions("vit_tiny_patch16_224", args, registers=2), 3, 32).eval()
    return Lens(backbone, 32, [0.5] * 3, [0.25] * 3)


def test_neighbours_are_never_of_the_same_group() -> None:
    features = np.array([[1, 0], [1, 0.01], [1, 0.1], [0, 1]], dtype=np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    (near,) = pictures.nearest(features, np.array([7, 7, 0, 0]), np.array([0]), k=2)
    assert [i for i, _ in near] == [2, 3]
    (near,) = pictures.nearest(features, np.array([0, 0, 0, 0]), np.array([0]), k=2)
    assert [i for i, _ in near] == [1, 2]


def test_shown_images_are_of_different_classes() -> None:
    classes = ["b", "a", None, "b", "c", "a"]
    features = np.eye(6, dtype=np.float32)
    gallery = Gallery(np.arange(6), features, features, classes, [None] * 6, np.zeros(6, np.int64))
    assert [classes[i] for i in pictures.spread_over_classes(gallery, 2)] == ["a", "c"]
    assert sorted(classes[i] for i in pictures.spread_over_classes(gallery, 9)) == ["a", "b", "c"]  # type: ignore[type-var]


def test_rare_classes_are_chosen_first(index: Path) -> None:
    shards = Index.open(index)
    chosen = pictures.choose(shards, shards.select(None), 16)
    labels = shards.column("label")
    assert set(labels[chosen]) == set(labels)
    assert np.array_equal(chosen, pictures.choose(shards, shards.select(None), 16))


def test_an_image_that_does_not_decode_is_left_out(index: Path, lens: Lens, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, shards = pictures.decode, Index.open(index)
    broken = shards.read(3).image

    def fragile(data: bytes, **options: int) -> np.ndarray:
        if data == broken:
            raise DataError("cut off")
        return decode(data, **options)

    monkeypatch.setattr(pictures, "decode", fragile)
    gallery = pictures.gather(shards, np.arange(6), lens, lens)
    assert gallery.numbers.tolist() == [0, 1, 2, 4, 5]
    assert len(gallery.features) == len(gallery.fresh) == len(gallery.classes) == 5
    assert len(pictures.gather(shards, np.array([3]), lens, lens)) == 0


def test_prototypes_beyond_the_limit_show_the_closest(run: Path) -> None:
    names = json.loads((run / "checkpoints" / "step-4" / "state.json").read_text())["data"]["classes"]
    page = Page("page")
    report_images.prototypes(page, run, run / "checkpoints" / "step-4", names, most=3)
    assert f"3 of {len(names)} classes" in page.render()


def test_prototypes_from_text_are_shown_before_at_the_start_and_after(index: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(report, "write", lambda run, data=None: run / "report.html")
    alone = [f"objectives.{name}=null" for name in ("dino", "ibot", "spread")]
    worded = ["objectives.labels={init: text, unfreeze_at: 0}", f"text.encoder={tiny_encoder()}"]
    out = tmp_path / "run"
    assert (
        main([*TINY, *alone, *worded, "steps=2", "optim.lr=0.5", "optim.warmup=0", f"data.train={index}", f"out={out}"])
        == 0
    )
    classes = Index.open(index).classes
    kept = load_file(out / "prototypes.safetensors")
    expected = text.class_embeddings(
        text.TextOptions(encoder=tiny_encoder(), classes=str(index / "classes.csv")), classes
    )
    torch.testing.assert_close(kept["text"], expected)
    page = Page("title", "subtitle")
    report_images.prototypes(page, out, out / "checkpoints" / "step-2", classes)
    html = page.write(tmp_path / "page.html").read_text(encoding="utf-8")
    titles = ["In the text encoder", "At the start", "Now"]
    assert [html.index(t) for t in titles] == sorted(html.index(t) for t in titles)
    assert "centring and whitening" in html
    assert "none has moved" not in html
