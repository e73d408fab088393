"""Two processes, and one of them dies or hangs: the job ends in time, with that process's own words.

Run as a program, this file becomes the two processes, in the place of the launcher.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from pretrain.batches import Batches
from pretrain.loop import main
from tests.pretrain.conftest import TINY
from tests.pretrain.forks import forked, join, meeting

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 0.6  # minutes; a first step takes long where others are at work


def dies() -> None:
    raise RuntimeError("lost its device")


def hangs_here() -> None:
    time.sleep(600)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "own_words"),
    [("dies", "RuntimeError: lost its device"), ("hangs_here", "process 1 has been at step 4 for")],
)
def test_a_process_that_fails_ends_the_job_with_its_own_words(
    fault: str, own_words: str, index: Path, tmp_path: Path
) -> None:
    arguments = [*TINY, f"data.train={index}", f"out={tmp_path / 'run'}", f"timeout={TIMEOUT}", "steps=50"]
    environment, place = {**os.environ, "PYTHONPATH": str(ROOT)}, meeting()
    program = [sys.executable, __file__, fault, str(place.port), str(tmp_path), *arguments]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=560)
    told = "".join(log.read_text() for log in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stderr + told
    assert own_words in told
    if fault == "hangs_here":
        assert "in hangs_here" in told  # where it is
    assert (tmp_path / "run" / "checkpoints" / "step-2").is_dir()  # and what was done is kept


def two(fault: str, port: str, folder: str, arguments: list[str]) -> int:
    """0 where both ended within the timeout (and a little), neither as if all were well. Each has a log of its own: a
    stack is written in pieces, and both write theirs at about the same time."""
    logs = [Path(folder, f"{rank}.log") for rank in (0, 1)]
    return both_end([forked(partial(one, rank, fault, port, arguments), log) for rank, log in enumerate(logs)])


def one(rank: int, fault: str, port: str, arguments: list[str]) -> int:
    join(rank, int(port))
    if rank == 1:
        following, taken = Batches.__next__, []

        def fourth(self: Batches):
            taken.append(1)
            if len(taken) == 4:  # the other process has begun step 3 by then, and with it the checkpoint of step 2
                globals()[fault]()
            return following(self)

        Batches.__next__ = fourth  # type: ignore[method-assign]
    return main(arguments)


def both_end(children: list[int]) -> int:
    deadline, left, codes = time.monotonic() + 60 * TIMEOUT + 150, set(children), []
    while left and time.monotonic() < deadline:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.discard(child)
                codes.append(os.waitstatus_to_exitcode(status))
        time.sleep(0.05)
    for child in left:
        os.kill(child, signal.SIGKILL)
    return 0 if not left and all(codes) else 1


if __name__ == "__main__":
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    sys.exit(two(*sys.argv[1:4], sys.argv[4:]))
