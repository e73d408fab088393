"""The doctor's door, and `recipe=auto`: two unlike sets train without a key touched, and go on with what they hold."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from hybridssl.__main__ import main as hybridssl
from hybridssl.recipe import read_yaml, to_dict
from pretrain import command, doctor, fingerprint
from pretrain.data import micro_batch
from pretrain.fingerprint import Machine
from pretrain.loop import main
from pretrain.start import check
from shards.build import BuildOptions, build
from shards.index import Index
from tests.pretrain.conftest import lines

SHORT = ["steps=2", "data.workers=0", "threads=1", "batch.size=8", "backbone.args.depth=2"]  # and no key else


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 grey 16-bit tiles of 40 x 52 px, read with one channel; two findings on some; half without a label."""
    root = tmp_path_factory.mktemp("grey")
    (root / "images").mkdir()
    rows = ["path,label,source"]
    for i in range(60):
        rng = np.random.default_rng(i)
        tile = cv2.resize(rng.integers(0, 4096, (5, 6)).astype(np.uint16), (52, 40), interpolation=cv2.INTER_LINEAR)
        cv2.imwrite(str(root / "images" / f"{i}.png"), tile)
        rows.append(f"{i}.png,{('opacity', 'effusion|opacity', '', '')[i % 4]},{'ab'[i % 2]}")
    (root / "labels.csv").write_text("\n".join(rows))
    build(root / "images", root / "shards", root / "labels.csv", BuildOptions(channels=1))
    return root / "shards"


@pytest.fixture(autouse=True)
def _no_gpu_and_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.report.write", lambda run, data: run / "report.html")  # takes longer than the steps
    true = fingerprint.machine
    monkeypatch.setattr(fingerprint, "machine", lambda names: replace(true(names), cores=2, bf16=False))


def test_fingerprint_of_grey_tiles(grey: Path) -> None:
    data = fingerprint.data(Index.open(grey), ("train", ""))
    assert (data.images, data.short_side, data.channels, data.bits) == (60, 40, 1, 16)
    assert data.grey
    assert data.per_class == {"effusion": 15, "opacity": 15}  # by first label
    assert data.several == 0.5
    assert data.sources == {"a": 30, "b": 30}
    assert len(data.mean) == len(data.std) == 1
    assert 0.2 < data.mean[0] < 0.8


def test_fingerprint_of_the_demo(index: Path) -> None:
    opened = Index.open(index)
    data = fingerprint.data(opened, ("train", ""))
    assert data.images == len(opened.select(("train", "")))
    assert (data.short_side, data.channels, data.bits, data.several, data.damaged) == (48, 3, 8, 0.0, 0)
    assert not data.grey
    assert 0 < data.labelled < data.images
    assert data.texts == data.masks == data.images
    pixels = [fingerprint.decode(opened.read(int(i)).image) for i in opened.select(("train", ""))]
    flat = np.concatenate([image.reshape(-1, 3) for image in pixels]) / 255
    assert np.allclose(data.mean, flat.mean(0), atol=0.01)
    assert np.allclose(data.std, flat.std(0), atol=0.02)


def test_colour_is_seen(index: Path, grey: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image with colour makes a set of colour."""
    true, seen = fingerprint.decode, []

    def mostly_grey(*args: object) -> np.ndarray:
        image = true(*args)  # type: ignore[arg-type]
        seen.append(1)
        return image if len(seen) == 7 else np.repeat(image[..., :1], 3, axis=2)

    monkeypatch.setattr(fingerprint, "decode", mostly_grey)
    assert not fingerprint.data(Index.open(index), ("train", "")).grey
    assert fingerprint.data(Index.open(index), ("train", "")).grey


def test_damaged_images_are_counted(index: Path, tmp_path: Path) -> None:
    shutil.copytree(index, tmp_path / "broken")
    opened = Index.open(tmp_path / "broken")
    numbers = opened.select(("train", ""))
    for number in numbers[:2].tolist():
        name, at = opened.shard_of(number)
        with open(tmp_path / "broken" / name, "r+b") as file:
            file.seek(at)
            file.write(b"\0" * 16)
    data = fingerprint.data(Index.open(tmp_path / "broken"), ("train", ""))
    assert (data.damaged, data.looked_at) == (2, len(numbers))


def test_machine_is_told_by_the_launcher_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fingerprint.machine(["vit_small_patch14_dinov2"])
    assert found.cores >= 1
    assert 0.1 < found.memory < 10_000
    assert found.had == frozenset()  # no weights lie where tests run
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert fingerprint.machine([]).processes == 3


@pytest.mark.parametrize("which", ["grey", "index"])
def test_auto_trains_and_goes_on_with_what_it_holds(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = request.getfixturevalue(which), tmp_path / "run"
    assert main([f"data.train={data}", f"out={out}", *SHORT]) == 0
    shown = capsys.readouterr().out
    assert "prototypes" in shown
    assert "why" in shown
    (told,) = (line for line in lines(out) if "loss" in line)
    assert told["step"] == 2
    assert np.isfinite(told["loss"])
    assert not told["skipped"]
    held = read_yaml(out / "recipe.yaml")
    assert held["name"] == "auto"
    assert held["objectives"]["labels"]["kind"] == ("multi" if which == "grey" else "one_of")
    assert held["views"]["global_size"] == (40 if which == "grey" else 48)

    # On another machine the same command, or the folder alone, goes on with the same recipe, and looks at no image.
    big = Machine(64, 512, gpus=8, gpu="H100", gpu_memory=80, bf16=True, processes=8)
    monkeypatch.setattr(fingerprint, "machine", lambda names: big)
    monkeypatch.setattr(fingerprint, "data", lambda *args: pytest.fail("looked again"))
    for arguments in ([f"data.train={data}", f"out={out}", *SHORT], ["recipe=auto", f"out={out}"]):
        assert to_dict(command.load(arguments)) == held
    assert main([f"out={out}", "log.every=1"]) == 0
    assert main([f"out={out}", "optim.lr=9"]) == 2
    assert "optim.lr" in capsys.readouterr().err


def test_a_run_begun_on_one_gpu_goes_on_on_several(
    index: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    command_line = [f"data.train={index}", f"out={tmp_path / 'run'}", *SHORT, "batch.size=32"]
    assert main(command_line) == 0
    held = read_yaml(tmp_path / "run" / "recipe.yaml")
    assert held["batch"] == {"size": 32, "micro": 32}
    for world, micro in ((1, 32), (2, 16)):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        found = command.load(command_line)
        assert to_dict(found) == held | {"batch": {"size": 32, "micro": micro}}
        assert micro_batch(found, world) == micro
        assert check(found, tmp_path / "run", found.data.open())  # the same run
    assert command.load([*command_line, "batch.micro=8"]).batch.micro == 8  # as the user says
    monkeypatch.setenv("WORLD_SIZE", "4")  # which would part the groups of 16 that spread compares
    with pytest.raises(ValueError, match=r"start 2 processes with batch\.micro=16"):
        micro_batch(command.load(command_line), 4)


def test_a_second_process_says_nothing(index: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [f"data.train={index}", f"out={tmp_path / 'run'}", *SHORT]
    first = command.load(arguments)
    assert capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert command.load(arguments) == first
    assert not capsys.readouterr().out


def test_doctor_prints_and_writes_a_recipe_that_runs(index: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "mine.yaml"
    assert hybridssl(["doctor", "--data", str(index), "--out", str(file), *SHORT]) == 0
    shown = capsys.readouterr().out
    for word in ("short side", "48 px", "labelled", "cores", "micro-batch", "duration", "measured", f"recipe={file}"):
        assert word in shown
    text = file.read_text()
    for word in ("# data", "# hardware", "# duration", "# result", "# command", "# labels, one_of"):
        assert word in text
    found = command.load([f"recipe={file}", "out=x"])
    assert (found.name, found.data.train, found.steps) == ("mine", str(index), 2)
    assert replace(found, name="auto") == command.load([f"data.train={index}", "out=x", *SHORT])
    assert hybridssl(["doctor", "--data", str(index), "--out", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_doctor_shows_the_command_for_what_it_showed(index: Path, capsys) -> None:
    keys = [*SHORT, "optim.lr=0.005", "backbone.args={depth: 2}"]
    assert hybridssl(["doctor", "--data", str(index), *keys]) == 0
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if line.startswith("next: accelerate launch pretrain "))
    words = shlex.split(line)[4:]
    assert words == [f"data.train={index}", *keys, "out=runs/NAME"]
    assert command.load(words).optim.lr == 0.005


def test_a_file_that_could_not_be_written_or_found_is_refused_before_the_work(
    index: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "deep" / "derm.yaml"
    assert hybridssl(["doctor", "--data", f"[{index}]", "--out", str(file), *SHORT]) == 0  # as a list may be written
    assert f"doctor` for {index}.\n" in file.read_text()
    assert command.load([f"recipe={file}", "out=x"]).name == "derm"
    capsys.readouterr()
    monkeypatch.setattr(fingerprint, "data", lambda *args: pytest.fail("looked"))
    cases = {
        "derm": "say --out derm.yaml",
        "derm.json": "say --out derm.json.yaml",
        str(file): "is there already",
        str(file / "derm.yaml"): "its folder cannot be made",
    }
    for out, words in cases.items():
        assert hybridssl(["doctor", "--data", str(index), "--out", out]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(doctor.os, "access", lambda path, how: False)  # root may write everywhere
    assert hybridssl(["doctor", "--data", str(index), "--out", str(tmp_path / "derm.yaml")]) == 2
    assert "may not be written to" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["batch.micro=auto", "batch.micro=0", "batch.size=40"])
def test_any_batch_is_timed(key: str, index: Path, capsys) -> None:
    """40: in groups of 10 neighbours, which a pass of 16 would part."""
    assert hybridssl(["doctor", "--data", str(index), *SHORT, key]) == 0
    assert "measured" in capsys.readouterr().out


def test_a_pass_that_does_not_fit_is_told(index: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*args: object) -> None:
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr("pretrain.measure.measure", full)
    assert doctor.main(["--data", str(index)]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert "byarithmetic" in shown
    assert "halve" in shown


def empty(index: Path, folder: Path) -> None:
    """An index of nothing, as no program of ours would write it."""
    from hashlib import sha256

    from safetensors.numpy import load_file, save_file

    folder.mkdir()
    columns = {name: column[: name == "key_at"] for name, column in load_file(index / "index.safetensors").items()}
    save_file(columns, folder / "index.safetensors")
    header = json.loads((index / "index.json").read_text()) | {"shards": [], "samples": 0}
    header["columns_sha256"] = sha256((folder / "index.safetensors").read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(header))


def test_bad_input_is_one_message_with_a_remedy(index: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "nothing").mkdir()
    empty(index, tmp_path / "empty")
    table = tmp_path / "labels.csv"
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((40, 40, 3), np.uint8))
    table.write_text("path,split\na.png,test\n")
    build(tmp_path / "images", tmp_path / "test-only", table, BuildOptions())
    cases: list[tuple[list[str], list[str]]] = [
        ([str(tmp_path / "nothing")], ["nothing holds no index.json", "shards build"]),
        ([str(tmp_path / "empty")], ["no sample at all", "nothing to train on"]),
        ([str(tmp_path / "test-only")], ["it has test 1", "--split 70/10/20"]),
        ([str(index), "batch.sise=4"], ["batch.sise", "batch.size"]),
        ([str(index), "views.local_size=20"], ["local_size=20", "multiple"]),
        ([str(index), "backbone.name=vit_nano"], ["vit_nano", "near"]),
    ]
    for arguments, words in cases:
        assert doctor.main(["--data", *arguments]) == 2, arguments
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        for word in words:
            assert word in message
    for arguments, word in (
        (["out=x"], "data.train"),
        ([f"data.train={index}"], "out="),
        ([f"data.train={index}", "out=2024"], "out must be text, not 2024"),
    ):
        assert main(arguments) == 2
        assert word in capsys.readouterr().err


def test_help_is_quick_and_has_examples() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "hybridssl", "doctor", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "python -m hybridssl doctor --data data/derm --out derm.yaml" in done.stdout
    assert "torch" not in done.stderr
