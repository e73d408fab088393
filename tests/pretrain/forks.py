"""Runs in forked processes: what is imported once serves many, and one may die without taking the others along."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from torch.distributed import TCPStore

FAILED = 70  # exit code of work that raised


def forked(work: Callable[[], int], log: Path | None = None) -> int:
    """The id of a child process that does `work` and exits with its code. It says what it says to the end of `log`, and
    so do faulthandler and C code in it. It leads a group of its own: its workers can be killed with it."""
    child = os.fork()
    if child:
        return child
    code = FAILED
    with contextlib.ExitStack() as stack:
        if log is not None:
            told = stack.enter_context(open(log, "a"))
            stack.enter_context(contextlib.redirect_stdout(told))
            stack.enter_context(contextlib.redirect_stderr(told))
            os.dup2(told.fileno(), 2)
        os.setsid()
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
    os._exit(code)


def ends(child: int) -> int:
    """The exit code of a child, once it has ended; -9 where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def meeting() -> TCPStore:
    """Where the processes of one run find one another, at `port`. It is taken as long as this object lives: one that is
    found free and taken later may be somebody else's by then."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def join(rank: int, port: int) -> None:
    """This process is `rank` of two, which meet at `port`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
