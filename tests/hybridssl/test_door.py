"""python -m hybridssl: what it prints, what it writes, and that mistakes end in one message and code 2."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hybridssl import text
from hybridssl.__main__ import main


def fake_embeddings(encoder, sentences, pooling):
    """A vector a sentence: which of the words it has. Classes that share words are alike."""
    words = ("melanoma", "nevus", "pigmented", "mole", "keratosis")
    return torch.tensor([[float(w in s) for w in words] for s in sentences]) + 0.1


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "embed_sentences", fake_embeddings)
    path = tmp_path / "classes.csv"
    path.write_text("class,name\nmel,pigmented melanoma\nnv,pigmented nevus\nbkl,keratosis\n")
    return path


def test_prototypes_writes_the_cache_and_prints_the_nearest_pair_first(table, tmp_path, capsys):
    out = tmp_path / "text.safetensors"
    assert main(["prototypes", "--encoder", "x", "--classes", str(table), "--out", str(out), "--pairs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "3 classes, 5 wide" in lines[0]
    assert lines[2].split()[:3] == ["mel", "~", "nv"]
    assert len(lines) == 4
    found, about = text.load_cache(out, ["nv"])
    assert found.shape == (1, 5)
    assert about["templates"] == list(text.TEMPLATES)


def test_prototypes_takes_templates_of_the_user(table, tmp_path):
    out = tmp_path / "text.safetensors"
    command = ["prototypes", "--encoder", "x", "--classes", str(table), "--out", str(out)]
    assert main([*command, "--template", "{}", "--template", "ein Bild: {}"]) == 0
    assert text.load_cache(out)[1]["templates"] == ["{}", "ein Bild: {}"]


def test_single_class_is_no_error(table, tmp_path):
    table.write_text("class\nnevus\n")
    assert main(["prototypes", "--encoder", "x", "--classes", str(table), "--out", str(tmp_path / "t")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prototypes", "--encoder", "x", "--classes", "none.csv", "--out", "t"], "none.csv cannot be read"),
        (["prototypes", "--encoder", "package:nix", "--classes", "ok.csv", "--out", "t"], "package:nix"),
        (["export", "no-run", "--out", "o"], "no-run holds no checkpoint"),
        (["export", "no-run"], "--out DIR is missing"),
        (["export", "no-run", "--out", "o", "--private", "--retag"], "--private, --retag without --push"),
        (["export", "no-run", "--out", "o", "--dataset", "my data"], "--dataset 'my data' is no hub id"),
        (["export", "no-run", "--out", "o", "--results", "nowhere"], "nowhere holds no results.json"),
    ],
)
def test_mistake_is_one_message_and_nothing_written(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ok.csv").write_text("class\nmel\n")
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert [p.name for p in tmp_path.iterdir()] == ["ok.csv"]


def test_export_passes_everything_on(monkeypatch, capsys):
    from hybridssl import export
    from hybridssl.stated import Stated

    seen = []
    report = SimpleNamespace(step=1200, parity={"timm": 0.0, "transformers": 2e-7}, results=0)
    monkeypatch.setattr(export, "export", lambda *args: seen.append(args) or report)
    command = [
        "export",
        "runs/a",
        "--out",
        "models/a",
        "--which",
        "student",
        "--license",
        "mit",
        "--overwrite",
        "--onnx",
    ]
    said = ["--license", "mit", "--dataset", "a/b", "--dataset", "c", "--data-license", "ours: ask", "--tag", "skin"]
    assert main([*command, *said]) == 0
    stated = Stated("mit", ("a/b", "c"), ("ours: ask",), ("skin",))
    assert seen == [("runs/a", "models/a", "student", stated, True, True)]
    printed = capsys.readouterr().out
    assert "student of step 1,200" in printed
    assert "timm 0.0e+00, transformers 2.0e-07" in printed
    assert "licence" not in printed


def test_argument_mistakes_exit_with_2(capsys):
    for arguments in ([], ["bake"], ["export"], ["export", "runs/a", "--out", "x", "--which", "both"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "example"),
    [([], "export runs/derm-s --out models"), (["prototypes"], "mel,melanoma"), (["export"], "local-dir:models/")],
)
def test_help_has_an_example_and_is_quick_to_come(arguments, example):
    command = [sys.executable, "-X", "importtime", "-m", "hybridssl", *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert example in done.stdout
    assert "torch" not in done.stderr  # help that loads torch first takes ten seconds
