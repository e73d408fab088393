"""The promises of the loop: accumulation, processes, death and resume change nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

from hybridssl import precision
from hybridssl.recipe import to_dict
from hybridssl.run import read_state
from pretrain.command import load
from pretrain.loop import main
from pretrain.recipe import changes
from shards import demo
from tests.pretrain.conftest import launch, lines, losses


def assert_close(a: list[dict[str, float]], b: list[dict[str, float]], tolerance: float) -> None:
    assert len(a) == len(b) > 0
    for left, right in zip(a, b, strict=True):
        assert left == pytest.approx(right, rel=tolerance, abs=tolerance)


@pytest.fixture
def whole(tiny: list[str], tmp_path: Path) -> Path:
    assert main([*tiny, f"out={tmp_path / 'whole'}"]) == 0
    return tmp_path / "whole"


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    assert [line["step"] for line in lines(whole)] == [1, 2, 3, 4]
    first = lines(whole)[0]
    assert {"loss/dino", "loss/ibot", "loss/spread", "loss/labels", "grad_norm", "lr", "momentum"} <= first.keys()
    assert {"health/target_entropy", "health/agreement", "health/prototype_usage", "health/rankme"} <= first.keys()
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {"step-2", "step-4", "latest"}
    assert (whole / "checkpoints" / "latest").read_text() == "step-4"
    assert "<html" in (whole / "report.html").read_text()
    teacher = load_file(whole / "checkpoints" / "step-4" / "model.safetensors")
    moved = [k for k in teacher if k.startswith("teacher.") and not torch.equal(teacher[k], teacher["student" + k[7:]])]
    assert len(moved) > 10  # the teacher is an average, not the student
    earlier = load_file(whole / "checkpoints" / "step-2" / "model.safetensors")
    assert sum(not torch.equal(teacher[key], earlier[key]) for key in moved) > 10  # and it follows


def test_micro_batches_equal_one_batch(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    assert main([*tiny, "batch.micro=4", f"out={tmp_path / 'micro'}"]) == 0
    assert_close(losses(tmp_path / "micro"), losses(whole), 1e-4)


@pytest.mark.parametrize("keys", [["efficiency.packed=false"], ["efficiency.checkpoint=true"]], ids=" ".join)
def test_how_the_backbone_is_run_changes_no_result(
    keys: list[str], whole: Path, tiny: list[str], tmp_path: Path
) -> None:
    assert main([*tiny, *keys, f"out={tmp_path / 'other'}"]) == 0
    assert_close(losses(tmp_path / "other"), losses(whole), 1e-4)


def test_the_precision_is_measured_once_and_kept(tiny: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    auto = [*tiny, "precision=auto"]
    run, begun = [*auto, f"out={tmp_path / 'run'}", "steps=2"], []
    monkeypatch.setattr(precision, "faster_in_bf16", lambda device: begun.append(device.type) or len(begun) == 1)
    AcceleratorState._reset_state(True)
    assert main(run) == 0
    assert "precision: bf16" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert main(run) == 0  # goes on where it was: at its end
    assert f"next: python -m hybridssl export {tmp_path / 'run'} --out models/run\n" in capsys.readouterr().out
    assert len(begun) == 1
    AcceleratorState._reset_state(True)
    assert main([*auto, f"out={tmp_path / 'new'}", "steps=1"]) == 0
    assert (begun[-1], len(begun)) == (PartialState().device.type, 2)
    assert "precision: 'no'" in (tmp_path / "new" / "recipe.yaml").read_text()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("step", [1, 3])
def test_kill_and_resume_equals_uninterrupted_bit_for_bit(
    whole: Path, tiny: list[str], tmp_path: Path, step: int
) -> None:
    out = tmp_path / "killed"
    process = launch([*tiny, f"out={out}"])
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= step):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert main([*tiny, f"out={out}"]) == 0
    assert losses(out) == losses(whole)
    assert read_state(out)["guard"] == read_state(whole)["guard"]  # it judges the next step alike
    for name in ("model.safetensors", "optim.safetensors"):
        a, b = (load_file(run / "checkpoints" / "step-4" / name) for run in (out, whole))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.timeout(600)
def test_an_interrupt_saves_and_the_same_command_goes_on(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    arguments = [*tiny, f"out={out}", "steps=500", "save.every=1000", "data.workers=1"]
    process = launch(arguments, start_new_session=True)
    while process.poll() is None and not (out / "metrics.jsonl").is_file():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 85, output
    (step,) = re.findall(r"stopped at step (\d+)", output)
    assert (out / "checkpoints" / f"step-{step}" / "state.json").is_file()
    assert "Traceback" not in output


def test_a_resumed_run_with_another_recipe_is_refused_with_the_keys(
    whole: Path, tiny: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert main([*tiny, f"out={whole}", "optim.lr=0.5", "seed=3"]) == 2
    message = capsys.readouterr().err
    assert "optim.lr" in message
    assert "seed: 0 -> 3" in message
    assert "out=" in message
    assert main([*tiny, f"out={whole}", "log.every=2", "data.workers=1"]) == 0  # what may change


def test_a_run_of_an_earlier_version_goes_on(tiny: list[str]) -> None:
    """A key that came later has its default there; one that is gone, or that says otherwise, is told."""
    now = load([*tiny, "out=runs/x"])
    old = to_dict(now)
    del old["views"]["curriculum"]
    assert changes(old, now) == []
    assert changes(old, load([*tiny, "out=runs/x", "views.curriculum=0.5"])) == ["views.curriculum: 0.0 -> 0.5"]
    assert changes({**old, "optimiser": "adam"}, now)[0] == "optimiser: adam -> (absent)"


def test_a_set_may_move_and_may_not_become_another(whole: Path, tiny: list[str], index: Path, tmp_path: Path) -> None:
    shutil.copytree(index, tmp_path / "scratch")
    assert main([*tiny, f"out={whole}", f"data.train={tmp_path / 'scratch'}", "steps=5"]) == 0
    assert [line["step"] for line in lines(whole)] == [1, 2, 3, 4, 5]
    demo.generate(tmp_path / "other", samples=40, seed=1, size=48)
    assert main([*tiny, f"out={whole}", f"data.train={tmp_path / 'other'}", "steps=6"]) == 2


def test_one_checkpoint_at_the_end_and_gradients_as_they_are(tiny: list[str], tmp_path: Path) -> None:
    """save.every=0 and optim.clip=0: off, and not a division or a gradient of zero."""
    assert main([*tiny, f"out={tmp_path / 'run'}", "save.every=0", "optim.clip=0"]) == 0
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-4", "latest"}
    assert main([*tiny, f"out={tmp_path / 'far'}", "save.every=0", "optim.clip=1e9"]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "far")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("seed=-1", ["seed is -1"]),
        ("optim.clip=-1", ["section optim", "clip is -1"]),
        ("recipe=dmeo", ["dmeo", "demo"]),
        ("views.loacl_size=16", ["views.loacl_size", "views.local_size"]),
        ("backbone.name=vit_tinny_patch16_224", ["vit_tinny_patch16_224", "vit_tiny_patch16_224"]),
        ("data.train=nowhere", ["nowhere", "index.json"]),
        ("backbone.weights=nobody/no-model", ["nobody/no-model"]),
        ("views.local_size=20", ["local_size", "8"]),
        ("log.trackers=[wandb]", ["log.trackers", "wandb", "pip install"]),
        ("batch.micro=3", ["batch.size=8", "3"]),
        ("batch.micro=2", ["batch.micro", "objectives.spread.group"]),
        ("objectives.labels.init=text", ["text", "prototypes"]),
        (
            "objectives.pixels={style: mae, width: 32, depth: 1}",
            ["mae", "views.mask_probability=1", "views.mask_ratio"],
        ),
        ("views.curriculum=1", ["views.curriculum=1", "below 1"]),
        ("objectives={dino: null, ibot: null, spread: null, labels: null}", ["objective"]),
    ],
)
def test_bad_input_gets_one_message_and_leaves_nothing(
    argument: str, words: list[str], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "bad"
    assert main([*tiny, f"out={out}", argument]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    for word in words:
        assert word in message
    assert not out.exists()


def test_a_text_encoder_that_cannot_be_had_is_named(tiny: list[str], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = ["objectives.labels.init=text", "text.encoder=nobody/no-encoder"]
    assert main([*tiny, *text, f"out={tmp_path / 'bad'}"]) == 2
    assert "nobody/no-encoder" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_sharding_by_accelerate_is_refused(tiny: list[str], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch --use_fsdp` does
    assert main([*tiny, f"out={tmp_path / 'bad'}"]) == 2
    told = capsys.readouterr().err
    assert "FSDP, and this loop spreads a model by itself" in told
    assert "efficiency.sharded=true" in told
    assert not (tmp_path / "bad").exists()


def test_labels_alone_and_none_at_all(tiny: list[str], tmp_path: Path) -> None:
    alone = ["objectives.dino=null", "objectives.ibot=null", "objectives.spread=null"]
    assert main([*tiny, *alone, f"out={tmp_path / 'alone'}"]) == 0
    assert {k for k in losses(tmp_path / "alone")[0] if k.startswith("loss/")} == {"loss/labels"}
    none = ["objectives.labels=null", "stream.labelled_fraction=0", f"out={tmp_path / 'none'}"]
    assert main([*tiny, *none]) == 0
    assert "loss/labels" not in losses(tmp_path / "none")[0]


def test_metrics_reach_the_trackers_by_one_key(tiny: list[str], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*tiny, f"out={tmp_path / 'run'}", "log.trackers=[tensorboard]"]) == 0
    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.out*")).parent)).Reload()
    told = [event.value for event in events.Scalars("loss/dino")]
    assert told == pytest.approx([line["loss/dino"] for line in lines(tmp_path / "run")], rel=1e-5)


def test_help_names_the_recipes(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("demo", "ham-cpu", "derm-s", "derm-b", "dermino", "data.train", "accelerate launch"):
        assert name in shown
