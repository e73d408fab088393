from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shards.__main__ import main
from shards.build import BuildOptions, build
from shards.index import Index
from shards.stats import stats


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_build_then_stats(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, table, out = str(photos / "images"), str(photos / "labels.csv"), str(tmp_path / "out")
    code, text, _ = run(capsys, "build", "--images", images, "--table", table, "--out", out, "--split", "60/40")
    assert code == 0
    assert "samples" in text
    assert f"next: python -m hybridssl doctor --data {out}" in text
    code, text, _ = run(capsys, "stats", out, "--verify")
    assert code == 0
    assert "melanoma" in text
    assert "every checksum agrees" in text


def test_demo_then_index_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    code, text, _ = run(capsys, "demo", "--out", str(out), "--samples", "40", "--size", "32")
    assert code == 0
    assert "synthetic" in text
    for name in ("index.safetensors", "nothing"):  # a lost file is one reason to do so
        (out / name).unlink(missing_ok=True)
        code, text, _ = run(capsys, "index", str(out), "--source", "again")
        assert code == 0
        again = Index.open(out)
        assert (len(again), again.synthetic, again.header["in_place"]) == (40, True, False)  # as it was
    assert run(capsys, "demo", "--out", str(out), "--samples", "40", "--size", "32", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["stats", "nowhere"], "holds no index.json"),
        (["index", "nowhere"], "nowhere is no folder"),
        (["build", "--images", "nowhere", "--out", "x"], "image folder nowhere does not exist"),
        (["build", "--images", "nowhere", "--out", "x", "--label-column", "dx"], "there is no --table"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1


def test_a_wrong_verb_exits_2_and_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["bild"], ["build"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    for verb in ("demo", "build", "index", "audit", "stats"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert f"example:\n  python -m shards {verb}" in capsys.readouterr().out


def test_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "shards", "stats", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_stats_names_leaks(photos: Path, tmp_path: Path) -> None:
    lines = (photos / "labels.csv").read_text(encoding="utf-8").splitlines()
    header, rows = lines[0] + ",split", lines[1:]
    rows = [row + (",train" if i % 2 else ",test") for i, row in enumerate(rows)]  # groups are pairs, so all cross
    (tmp_path / "t.csv").write_text("\n".join([header, *rows]), encoding="utf-8")
    found = stats(build(photos / "images", tmp_path / "out", tmp_path / "t.csv", BuildOptions()).index)
    assert found.splits == {"train": 30, "test": 30}
    assert found.warnings[0].startswith("30 groups (patients) have images in more than one split")
    assert found.classes["nevus"] == {"train": 20}
    assert "split test has no sample of nevus, ulcer" in found.warnings
    assert found.sources["a"] == {"": 10, "melanoma": 20}
    assert found.sides == (48, 48, 48)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("path,label\n{0},x\n{1},x", "no image is in a split, so pretraining reads all"),
        ("path,label\n{0},x\n{1},x", "classes of fewer than 10 images: x (2)"),
        ("path,split\n{0},ward 3\n{1},train", "know the splits train, val and test, not ward 3"),
        ("path,dx\n{0},x\n{1},x", "no label is known: if a column of the table holds them"),
    ],
)
def test_stats_says_what_will_be_missed_later(photos: Path, tmp_path: Path, rows: str, says: str) -> None:
    names = sorted(path.relative_to(photos / "images").as_posix() for path in (photos / "images").rglob("*.jpg"))
    (tmp_path / "t.csv").write_text(rows.format(*names), encoding="utf-8")
    found = stats(build(photos / "images", tmp_path / "out", tmp_path / "t.csv", BuildOptions()).index)
    assert any(says in warning for warning in found.warnings), found.warnings
