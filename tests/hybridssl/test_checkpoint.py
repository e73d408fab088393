"""Checkpoints: there whole or not at all, beside the run, and never the reason for its end."""

from __future__ import annotations

import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from hybridssl import checkpoint, files, run
from hybridssl.checkpoint import Keep, Writer
from hybridssl.errors import UserError


class Model(nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size)


def state(step: int) -> run.RunState:
    return run.RunState(step, 8 * step, {"seed": 0}, {"options": {}}, {"position": 8 * step})


def three(size: int = 4) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Model(size)
    optimizer = torch.optim.AdamW(model.parameters())
    model.layer(torch.ones(1, size)).sum().backward()
    optimizer.step()
    return model, Model(size), optimizer


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_the_newest_some_between_and_the_best_stay(tmp_path: Path) -> None:
    writer = Writer(tmp_path, Keep(last=2, every=4))
    for step in range(1, 11):
        writer.save(state(step), *three(), best=step in (2, 3))
    writer.wait()
    assert names(tmp_path) == ["best", "latest", "step-10", "step-3", "step-4", "step-8", "step-9"]
    assert [(tmp_path / "checkpoints" / name).read_text() for name in ("latest", "best")] == ["step-10", "step-3"]


def test_what_is_written_is_what_was_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, inside = threading.Event(), checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *a: go.wait(20) and inside(*a))
    model, teacher, optimizer = three()
    before = model.layer.weight.detach().clone()
    writer = Writer(tmp_path, Keep())
    writer.save(state(1), model, teacher, optimizer)
    with torch.no_grad():
        model.layer.weight.zero_()  # the next steps, while the disk is slow
        for moment in optimizer.state.values():
            moment["exp_avg"].zero_()
    assert not run.checkpoints(tmp_path)
    go.set()
    writer.wait()
    assert torch.equal(run.read_tensors(tmp_path)["student.layer.weight"], before)
    assert run.read_tensors(tmp_path, "optim.safetensors")["layer.weight|exp_avg"].abs().sum() > 0


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["model.safetensors", "optim.safetensors", "state.json", "no optim", "no state"])
def test_a_damaged_newest_one_is_named_and_the_one_before_used(what: str, tmp_path: Path, capsys) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step), *three())
    newest = tmp_path / "checkpoints" / "step-2"
    if what.startswith("no "):
        (newest / {"no optim": "optim.safetensors", "no state": "state.json"}[what]).unlink()
    else:
        damage(newest / what)
    assert run.latest(tmp_path).name == "step-1"
    assert run.read_state(tmp_path)["step"] == 1
    told = capsys.readouterr().err
    assert str(newest) in told
    assert "the checkpoint before it" in told
    if "state" not in what:
        with pytest.raises(UserError, match=r"damaged|missing"):
            run.read_tensors(newest)  # asked for by name, it is refused
    checkpoint.save(tmp_path, state(2), *three())  # the run writes it again
    assert run.latest(tmp_path).name == "step-2"


def test_a_file_that_replaces_another_is_read_again_whatever_its_time(tmp_path: Path) -> None:
    newest = tmp_path / "checkpoints" / "step-1"
    checkpoint.save(tmp_path, state(1), *three())
    damage(newest / "model.safetensors")
    with pytest.raises(UserError, match="damaged"):
        run.latest(tmp_path)
    moment = (newest / "model.safetensors").stat().st_mtime_ns
    checkpoint.save(tmp_path, state(1), *three())  # of the same size, and here of the same tick of the clock
    os.utime(newest / "model.safetensors", ns=(moment, moment))
    assert run.latest(tmp_path) == newest


def test_none_whole_is_an_error_that_names_the_damage(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), *three())
    damage(tmp_path / "checkpoints" / "step-1" / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        run.latest(tmp_path)


def test_a_full_disk_is_survived_and_the_next_write_tried(tmp_path: Path) -> None:
    three_of = three(64)  # 16 KiB a matrix
    writer = Writer(tmp_path, Keep())
    writer.save(state(1), *three_of)
    writer.wait()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (10_000, limits[1])
    )  # the kernel refuses to write on, as a full disk does
    try:
        writer.save(state(2), *three_of)
        writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    told = writer.failed()
    assert told
    assert "step 2" in told
    assert writer.failed() is None  # told once
    assert names(tmp_path) == ["latest", "step-1"]  # nothing half-written, nothing lost
    writer.save(state(3), *three_of)
    writer.wait()
    assert (writer.failed(), run.latest(tmp_path).name) == (None, "step-3")


def test_what_a_killed_run_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    for step in range(3):
        checkpoint.save(tmp_path, state(step), *three(), Keep(last=9))
    left = tmp_path / "checkpoints" / "step-5.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert [p.name for p in run.checkpoints(tmp_path)] == ["step-2", "step-1", "step-0"]
    Writer(tmp_path, Keep(), step=2)
    assert names(tmp_path) == ["latest", "step-1", "step-2"]  # it died before it removed the third one, too


def test_the_best_is_known_though_the_run_was_killed_before_it_said_so(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), *three(), Keep(last=1), best=True)
    (tmp_path / "checkpoints" / "best").unlink()  # the death was between the renaming and this
    writer = Writer(tmp_path, Keep(last=1), step=1)
    writer.save(state(2), *three())
    writer.wait()
    assert names(tmp_path) == ["best", "latest", "step-1", "step-2"]
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-1"
    Writer(tmp_path, Keep(last=1), step=2)
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-1"


def test_a_damaged_checkpoint_displaces_no_whole_one(tmp_path: Path) -> None:
    """One is kept: not the damaged one of step 8, to which the run that goes on from step 4 has yet to come."""
    for step in (4, 8):
        checkpoint.save(tmp_path, state(step), *three(), Keep(last=9))
    damage(tmp_path / "checkpoints" / "step-8" / "model.safetensors")
    writer = Writer(tmp_path, Keep(last=1), step=4)
    assert run.latest(tmp_path).name == "step-4"
    for step in (6, 8):
        writer.save(state(step), *three())
        writer.wait()
        assert run.latest(tmp_path).name == f"step-{step}"
    assert names(tmp_path) == ["latest", "step-8"]


def test_text_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_text(path, "old")

    def fails(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
