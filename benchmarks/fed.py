"""The contestants of endtoend.py, each with its own loader: from JPEG files to a figure.

Ours is `pretrain` as a command; the others are the loaders of feeds.py and the steps of peers.py. Each measures itself
for the same time, on whatever device there is.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.contestants import Setting, network
from benchmarks.feeds import FEEDS
from benchmarks.peers import PEERS
from pretrain import meters

LOG_EVERY = {"cuda": 10, "cpu": 5}  # steps: a log point has its own cost, and a step on a CPU takes seconds
STEPS = 1_000_000  # more than there is time for

Figures = dict[str, float]  # images_per_s, data_wait, memory_gib


@dataclass(frozen=True)
class Terms:
    """What all contestants have in common."""

    images: Path  # folder of JPEG files, in a subfolder as ImageFolder wants it
    shards: Path  # the same, built
    seconds: float
    workers: int
    threads: int = 0  # CPU threads of the step; 0: all cores
    keys: tuple[str, ...] = ()  # key=value for our recipe


Contestant = Callable[[Setting, Terms], Figures]


def ours(setting: Setting, terms: Terms) -> Figures:
    """`python -m pretrain` until its log covers enough seconds, then killed: nothing of the run is to be kept."""
    with tempfile.TemporaryDirectory(dir=terms.shards.parent) as folder:
        recipe, told, metrics = (Path(folder) / name for name in ("recipe.yaml", "told.log", "run/metrics.jsonl"))
        recipe.write_text(yaml.safe_dump(recipe_of(setting, terms)), encoding="utf-8")
        command = [sys.executable, "-m", "pretrain", f"recipe={recipe}", f"out={metrics.parent}", *terms.keys]
        with open(told, "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            while (found := read(metrics, terms)) is None:
                if process.poll() is not None:
                    last = told.read_text(encoding="utf-8").strip().splitlines()[-1:]
                    raise RuntimeError(f"pretrain ended by itself, exit code {process.returncode}: {''.join(last)}")
                time.sleep(0.2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return found


def recipe_of(setting: Setting, terms: Terms) -> dict[str, Any]:
    """The setting as a recipe. Prototypes move from the start: the others' do, and it takes time."""
    net, heads = network(setting), {"prototypes": setting.prototypes, "freeze_last": 0.0}
    return {
        "steps": STEPS,
        "precision": setting.precision,
        "threads": terms.threads,
        "data": {"train": str(terms.shards), "workers": terms.workers},
        "batch": {"size": setting.batch},
        "views": {key: getattr(setting, key) for key in ("global_size", "local_size", "local_count")},
        "backbone": {"name": net.name, "args": dict(net.args)},
        "objectives": {"dino": heads, "ibot": dict(heads), "spread": {"weight": 0.1}},
        "log": {"every": LOG_EVERY[device().type]},
        "save": {"every": 0},
        "probe": {"every": 0},
    }


def read(metrics: Path, terms: Terms) -> Figures | None:
    """What a run's log says of the time after its warm-up; None where it is not long enough yet."""
    lines = []
    for text in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        with contextlib.suppress(ValueError):  # half a line, which is being written
            lines.append(json.loads(text))
    warm = next((i for i, line in enumerate(lines) if line["seconds"] >= terms.seconds / 3), len(lines))
    if warm >= len(lines) - 1 or lines[-1]["seconds"] - lines[warm]["seconds"] < terms.seconds:
        return None
    counted = lines[warm:]
    took = [after["seconds"] - before["seconds"] for before, after in pairwise(counted)]
    waited = sum(line["data_wait"] * seconds for line, seconds in zip(counted[1:], took, strict=True))
    return {
        "images_per_s": (counted[-1]["images"] - counted[0]["images"]) / sum(took),
        "data_wait": waited / sum(took),
        "memory_gib": counted[-1]["memory_gib"],
    }


def peer(name: str, setting: Setting, terms: Terms) -> Figures:
    """Somebody else's loader and step. Raises ImportError where the package is not installed."""
    where = device()
    if where.type == "cpu":
        torch.set_num_threads(terms.threads or os.cpu_count() or 1)  # as pretrain does
    load = FEEDS[name](setting, terms.images, terms.workers, where)
    meter = meters.Meter(setting.batch, {}, None)

    def feed() -> Sequence[Tensor]:
        with meter.waiting():
            return load()

    step = PEERS[name](setting, where, feed)
    for seconds in (terms.seconds / 3, terms.seconds):
        synchronise(where)
        meter.restart()
        while meter.seconds() < seconds:
            step()
            meter.step(setting.global_size)
    synchronise(where)
    return meter.read()


def alone(name: str, setting: Setting, terms: Terms) -> Figures:
    """`peer` in a process of its own, which takes its memory, its threads and what it patched with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peer, name, setting, terms).result()


CONTESTANTS: dict[str, Contestant] = {"ours": ours, **{name: partial(alone, name) for name in FEEDS}}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize()
