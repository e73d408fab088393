from __future__ import annotations

import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest

from finetune.__main__ import VERBS, main
from tests.finetune.judging import patients, write


@pytest.fixture
def refuse(capsys):
    """Run the door, expect exit code 2 and one line on stderr; give that line."""

    def run(*arguments):
        assert main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ")
        assert "\n" not in error
        return error

    return run


def options(backbone, data, out):
    return ["--backbone", backbone, "--data", data, "--out", out]


def test_missing_index(refuse, tmp_path, export_folder):
    error = refuse("knn", *options(export_folder, tmp_path / "nowhere", tmp_path / "out"))
    assert "nowhere holds no index.json" in error
    assert not (tmp_path / "out").exists()


def test_wrong_backbone(refuse, tmp_path, index):
    error = refuse("knn", *options("timm:vit_smal_patch16_224", index.root, tmp_path / "out"))
    assert "timm has no 'vit_smal_patch16_224'; near: vit_small_patch16_224" in error


def test_no_labels(refuse, tmp_path, new_index, table, export_folder):
    data = new_index([{**row, "label": ""} for row in table if row["split"] == "train"] + table[-3:])
    error = refuse("probe", *options(export_folder, data.root, tmp_path / "out"))
    assert "no labelled image in split 'train'" in error
    assert "label and split columns" in error


def test_no_test_split(refuse, tmp_path, new_index, table, export_folder):
    data = new_index([row for row in table if row["split"] == "train"])
    assert "no labelled image in split 'test' (0 without" in refuse(
        "knn", *options(export_folder, data.root, tmp_path / "o")
    )


def test_one_class(refuse, tmp_path, new_index, table, export_folder):
    data = new_index([row for row in table if row["label"] == "red"])
    assert "all of one class" in refuse("knn", *options(export_folder, data.root, tmp_path / "o"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--labels", "1.5"], "--labels 1.5 must be above 0 and at most 1"),
        (["--source", "nowhere"], "no source 'nowhere'; it has ward"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used"),
        (["--k", "0"], "--k"),
    ],
)
def test_bad_values(refuse, tmp_path, index, export_folder, extra, message):
    assert message in refuse("knn", *options(export_folder, index.root, tmp_path / "o"), *extra)


def test_report_of_nothing(refuse, tmp_path):
    assert "holds no results.json" in refuse("report", tmp_path)
    assert "must be the name of an .html file" in refuse("report", tmp_path, "--out", tmp_path)


@contextmanager
def small_disk():
    """No file grows beyond a thousand bytes, which an operating system reports as it does a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_cannot_be_written_is_named(refuse, tmp_path):
    known, page = write(tmp_path / "knn", patients(300)), tmp_path / "page.html"
    (tmp_path / "file").write_text("")
    assert f"error: {tmp_path / 'file'}: " in refuse("report", known, "--out", tmp_path / "file" / "page.html")
    with small_disk():
        assert refuse("report", known, "--out", page) == f"error: {page}.partial: File too large"
    with small_disk(), pytest.raises(OSError, match=r"File too large.*knn/predictions\.safetensors\.partial"):
        write(tmp_path / "knn", patients(300))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "--out" in said
    assert f"\n  python -m finetune {verb} " in said, "a newcomer copies a command"


def test_the_door_itself():
    done = subprocess.run([sys.executable, "-m", "finetune", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)
    assert "examples:" in done.stdout
    wrong = subprocess.run([sys.executable, "-m", "finetune", "knnn"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    assert "knn" in wrong.stderr
