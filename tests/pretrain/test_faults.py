"""What goes wrong around a run: signals, dead workers, dead launchers, processes that hang, full disks."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.multiprocessing import start_processes

from hybridssl import checkpoint
from hybridssl.run import read_state
from pretrain import journal, stop
from pretrain.keeper import Keeper
from pretrain.loop import main
from tests.pretrain.conftest import launch, lines, losses
from tests.pretrain.forks import join, meeting

pytestmark = pytest.mark.timeout(600)  # a command, and its launcher, take long to start where others are at work


def when(true: Callable[[], object], process: subprocess.Popen) -> None:
    """Wait for something, while `process` lives; the test's own timeout says when it is too long."""
    while not true():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def over(process: psutil.Process) -> bool:
    """Whether it has ended, also where it is nobody's child any more, and the first process here collects no orphan."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_within_a_step_says_how_to_go_on_and_exits_85(
    number: signal.Signals, tiny: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = launch([*tiny, f"out={out}", "steps=500", "save.every=1000", "data.workers=1"], start_new_session=True)
    when((out / "metrics.jsonl").is_file, process)
    os.killpg(process.pid, number)  # as a scheduler does: the loader's workers get it too
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 85, told
    (step,) = re.findall(r"stopped at step (\d+) of 500, checkpoint written; the same command goes on", told)
    assert (read_state(out)["step"], lines(out)[-1]["step"]) == (int(step), int(step))
    assert (out / "stopped").read_text() == f"step {step}\n"
    assert "Traceback" not in told


def test_a_launcher_that_is_killed_takes_the_run_along_in_order(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    one, plain = ["--num_processes", "1", "--num_machines", "1"], ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--cpu", *one, *plain, "-m", "pretrain"]
    with open(tmp_path / "log", "w") as log:
        arguments = [*tiny, f"out={out}", "steps=5000", "save.every=10000"]
        process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log)
    when((out / "metrics.jsonl").is_file, process)
    (run,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    while not over(run):
        time.sleep(0.01)
    assert (out / "stopped").is_file(), (tmp_path / "log").read_text()
    assert read_state(out)["step"] == lines(out)[-1]["step"]


def test_a_run_that_was_stopped_forgets_it_when_it_goes_on(tiny: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stop.Stop, "share", lambda self: setattr(self, "reason", stop.PREEMPTED))
    assert main([*tiny, f"out={tmp_path / 'run'}"]) == 85
    assert (tmp_path / "run" / "stopped").is_file()
    monkeypatch.undo()
    assert main([*tiny, f"out={tmp_path / 'run'}"]) == 0
    assert not (tmp_path / "run" / "stopped").exists()


def asks_at_step_two(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    torch.distributed.init_process_group("gloo")
    with stop.Stop() as asked:
        step = 0
        while not asked.reason and step < 50:
            step += 1
            if (rank, step) == (1, 2):
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.02 * rank)  # they are never at the same place
            asked.share()
        Path(folder, str(rank)).write_text(f"{step} {asked.reason}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_all_processes_stop_at_the_same_step_one_after_it_was_asked_for(tmp_path: Path) -> None:
    place = meeting()
    start_processes(asks_at_step_two, args=(place.port, str(tmp_path)), nprocs=2, start_method="fork")
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["3 1", "3 1"]


def test_a_worker_that_dies_is_told_with_the_sample_it_was_at(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = launch([*tiny, f"out={out}", "steps=5000", "save.every=2", "data.workers=1"])
    when((out / "checkpoints" / "latest").is_file, process)
    children = psutil.Process(process.pid).children()
    (worker,) = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
    worker.kill()
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    (error,) = [line for line in told.splitlines() if line.startswith("error: ")]
    for word in (
        "worker of the loader died",
        f"{worker.pid}, killed by SIGKILL",
        "The loader was at synthetic-",
        ".tar",
        "data.workers",
    ):
        assert word in error
    assert "Traceback" not in told


HANGS = """
import sys, time, threading
from pretrain.watchdog import Watchdog
with Watchdog(0.5, 3, lambda: "The loader was at a.tar. ") as dog:
    dog.beat("step 7")
    {}
"""


@pytest.mark.parametrize("body", ["time.sleep(60)", "import ctypes; ctypes.PyDLL(None).sleep(60)"])
def test_a_process_that_hangs_ends_itself_and_says_where(body: str) -> None:
    """The second holds Python's lock, as a library in C that never returns does."""
    done = subprocess.run([sys.executable, "-c", HANGS.format(body)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert 'File "<string>", line 6 in <module>' in done.stderr
    if "PyDLL" not in body:
        assert "process 3 has been at step 7 for" in done.stderr
        assert "a.tar" in done.stderr


WORKS = """
import threading, time
from pretrain.watchdog import Watchdog
now, slept = [0.0], []
time.monotonic = lambda: now[0]
with Watchdog(600.0, 0, str) as dog:
    for step in range(60):  # ten hours in all, ten minutes between two beats
        now[0] += 600.0
        dog._over.wait(0.05) or slept.append(step)
        dog.beat(str(step))
assert len(slept) == 60
assert "watchdog" not in {thread.name for thread in threading.enumerate()}  # no moment longer
now[0] += 6000.0
time.sleep(1.5)  # longer than it sleeps: nor when it is over
"""


def test_a_process_that_works_is_left_alone() -> None:
    """Minutes of work pass on a clock of its own, so that a busy machine is no hang."""
    done = subprocess.run([sys.executable, "-c", WORKS], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_outlives_a_full_disk(tiny: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    """The checkpoint of step 2 and the lines of steps 2 and 3 do not fit."""
    out, inside, opened = tmp_path / "run", checkpoint.save_file, open
    left: list[int] = []

    def save_file(*arguments) -> None:
        left.append(1)
        (full if len(left) == 1 else inside)(*arguments)

    def refuses(path, mode="r", *more, **names):
        kept = len(lines(out)) if (out / "metrics.jsonl").is_file() else 0
        if Path(path).name == "metrics.jsonl" and "a" in mode and kept == 1 and len(tried) < 2:
            tried.append(1)
            full()
        return opened(path, mode, *more, **names)

    tried: list[int] = []
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    monkeypatch.setattr(journal, "open", refuses, raising=False)
    assert main([*tiny, f"out={out}"]) == 0
    told = capsys.readouterr().err
    assert "checkpoint of step 2 could not be written" in told
    assert "metrics.jsonl could not be written" in told
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]
    assert [p.name for p in (out / "checkpoints").glob("step-*")] == ["step-4"]


@pytest.mark.parametrize("before_the_log_point", [True, False])
def test_a_last_checkpoint_that_does_not_fit_is_an_error(
    before_the_log_point: bool, tiny: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    """Also where writing fails so soon that the last log point tells it."""
    save = Keeper.save

    def saved(self: Keeper, *arguments: Any) -> None:
        save(self, *arguments)
        if before_the_log_point:
            self.wait()

    monkeypatch.setattr(Keeper, "save", saved)
    monkeypatch.setattr("pretrain.keeper.AGAIN", 0.0)
    monkeypatch.setattr(checkpoint, "save_file", full)
    assert main([*tiny, f"out={tmp_path / 'run'}"]) == 1
    assert "the checkpoint of step 4 could not be written" in capsys.readouterr().out


def test_more_steps_are_accepted_and_fewer_are_not(tiny: list[str], tmp_path: Path, capsys) -> None:
    run = [*tiny, f"out={tmp_path / 'run'}"]
    assert main(run) == 0
    assert main([*run, "steps=6"]) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert main([*run, "steps=5"]) == 2
    assert "steps: 6 -> 5" in capsys.readouterr().err
    assert main([*run, "steps=6", "resume=never"]) == 2
    assert "resume=never" in capsys.readouterr().err


def test_a_run_ends_early_when_the_probe_no_longer_improves_and_keeps_the_best(
    tiny: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    values = iter([0.2, 0.5, 0.4, 0.3, 0.9])
    found = lambda *_: {"probe/linear": next(values), "probe/knn": 0.1}  # noqa: E731
    monkeypatch.setattr("pretrain.probe._Judged.__call__", found)
    run = [*tiny, f"out={tmp_path / 'run'}", "steps=40", "save.every=4", "save.keep=1", "probe.every=3"]
    assert main([*run, "probe.early_stop=2"]) == 0
    told = capsys.readouterr().out
    assert "ended early: 2 probes without a better one" in told
    assert "export " + str(tmp_path / "run" / "checkpoints" / "step-6") in told
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")) == ["step-13", "step-6"]
    assert main([*run, "probe.early_stop=2"]) == 0  # it has ended: not a step more
    assert lines(tmp_path / "run")[-1]["step"] == 13


def test_writing_a_checkpoint_hardly_stalls_the_run(tiny: list[str], tmp_path: Path, monkeypatch) -> None:
    """The loop waits for a copy, not for the disk: here one that writes nothing until the loop has gone on."""
    inside, save, went_on, waited = checkpoint.save_file, Keeper.save, threading.Event(), []

    def slow(*arguments) -> None:
        waited.append(not went_on.wait(20))
        inside(*arguments)

    def saved(self: Keeper, *arguments: Any) -> None:
        save(self, *arguments)
        went_on.set()

    monkeypatch.setattr(checkpoint, "save_file", slow)
    monkeypatch.setattr(Keeper, "save", saved)
    assert main([*tiny, f"out={tmp_path / 'run'}", "save.every=4"]) == 0
    assert waited == [False, False]


def test_a_run_that_fails_leaves_the_checkpoint_that_it_had_begun(tiny: list[str], tmp_path: Path, monkeypatch) -> None:
    """Whatever ends the process afterwards, and however soon."""
    inside, failing = checkpoint.save_file, threading.Event()

    def slow(*arguments) -> None:
        failing.wait(20)
        inside(*arguments)

    def fails(*_: object) -> None:
        failing.set()
        raise RuntimeError("lost its device")

    monkeypatch.setattr(checkpoint, "save_file", slow)
    monkeypatch.setattr("pretrain.loop.step_seed", lambda seed, step, rank: fails() if step == 2 else 0)
    with pytest.raises(RuntimeError, match="lost its device"):
        main([*tiny, f"out={tmp_path / 'run'}"])
    assert read_state(tmp_path / "run")["step"] == 2


def test_going_on_with_another_number_of_processes_continues_the_curve(tiny: list[str], tmp_path: Path) -> None:
    """Two processes take the first half, one the second; see test_processes.py for two against one."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert main([*tiny, f"out={whole}"]) == 0
    half = [*tiny, f"out={out}", "steps=4"]
    place = meeting()
    start_processes(first_half, args=(place.port, half), nprocs=2, start_method="spawn")
    assert read_state(out)["step"] == 2
    assert main(half) == 0
    for left, right in zip(losses(out), losses(whole), strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-4)


def first_half(rank: int, port: int, arguments: list[str]) -> None:
    join(rank, port)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    inside = stop.Stop.share

    def share(self: stop.Stop) -> None:
        self.ask(stop.PREEMPTED)  # in the first step, so after the second
        inside(self)

    stop.Stop.share = share  # type: ignore[method-assign]
    assert main(arguments) == 85
    os._exit(0)  # as the command leaves: a library's thread that Python ends may abort the process
