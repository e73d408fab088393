"""What a run asks of the kernel about its launcher. Nothing slow is imported here: the launcher may end meanwhile."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def follow_the_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher dies: one that is told to stop, or is killed, tells nobody.

    Only where there is one: a run that a shell started outlives its shell.
    """
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
