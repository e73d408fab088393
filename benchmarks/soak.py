"""Two runs side by side for hours: one in peace, one killed again and again. Do they end alike, and stay small?

    make soak          or  python -m benchmarks.soak --hours 2

Writes the section "soak" of results/reliability.json: deaths, steps taken again, whether every line and every tensor
of the two are equal, and memory and open files of the calm run, early against late.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from benchmarks.common import write_section
from hybridssl import run as runs
from shards import demo

STEPS = 200_000  # more than there is time for: both are stopped by the clock
TIMED = ("seconds", "images_per_s", "data_wait", "memory_gib", "tflops", "mfu", "eta")
LOOK = 10.0  # seconds between two looks at memory and open files


class Run:
    """A pretraining run on one core, as a process group."""

    def __init__(self, out: Path, data: Path) -> None:
        self.out = out
        # Saved often enough that a busy machine gets on between two deaths; probed within the first tenth of the time.
        keys = [f"steps={STEPS}", "threads=1", "save.every=20", "save.keep_every=200", "probe.every=100"]
        self.command = [sys.executable, "-m", "pretrain", "recipe=demo", f"data.train={data}", f"out={out}", *keys]
        self.begin()

    def begin(self) -> None:
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        with open(self.out.with_suffix(".log"), "a") as log:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def end(self, number: signal.Signals) -> int:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        return self.process.wait(timeout=300)

    def size(self) -> tuple[float, float, int]:
        """MiB that the process holds by itself, and its loader's worker; its open files. (Not what they share: that
        shrinks as either writes to it, and the sum of both would seem to grow.)"""
        main = psutil.Process(self.process.pid)
        workers = sum(one.memory_info().rss for one in main.children(recursive=True))
        return main.memory_info().rss / 2**20, workers / 2**20, main.num_fds()

    def lines(self) -> list[dict[str, Any]]:
        path = self.out / "metrics.jsonl"
        found = []
        for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with contextlib.suppress(ValueError):  # half a line of a run that was killed
                found.append(json.loads(text))
        return found

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.lines()), default=0)


def soak(folder: Path, hours: float, seed: int) -> dict[str, Any]:
    data = folder / "demo"
    if not (data / "index.json").is_file():
        demo.generate(data)
    calm, killed = Run(folder / "calm", data), Run(folder / "killed", data)
    chance, over = random.Random(seed), time.monotonic() + 3600 * hours
    sizes: list[tuple[float, float, int]] = []
    deaths, again, next_death = 0, 0, time.monotonic() + 60
    while time.monotonic() < over:
        time.sleep(LOOK)
        if calm.process.poll() is not None:
            raise SystemExit(f"the calm run ended by itself: see {calm.out.with_suffix('.log')}")
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker that has just ended
            sizes.append(calm.size())
        if time.monotonic() > next_death:
            before = killed.step
            assert killed.end(signal.SIGKILL) == -signal.SIGKILL, "the killed run had ended by itself"
            deaths += 1
            again += before - max(checkpoints(killed.out), default=0)
            killed.begin()
            next_death = time.monotonic() + chance.uniform(20, 300)
            print(f"death {deaths} at step {before}; the calm run is at {calm.step}", flush=True)
    codes = [run.end(signal.SIGTERM) for run in (calm, killed)]
    return {
        "hours": hours,
        "deaths": deaths,
        "exit_codes": codes,
        "steps": {"calm": calm.step, "killed": killed.step},
        "steps_taken_again": again,
        **compare(calm, killed),
        **growth(sizes),
    }


def checkpoints(out: Path) -> list[int]:
    return [runs.step_of(folder) for folder in runs.checkpoints(out)]


def compare(calm: Run, killed: Run) -> dict[str, Any]:
    """Every logged line and the tensors of the newest checkpoint that both have."""
    last = min(calm.step, killed.step)
    plain = [
        {line["step"]: {k: v for k, v in line.items() if k not in TIMED} for line in run.lines() if line["step"] < last}
        for run in (calm, killed)
    ]
    regular = [[step for step in lines if step % 10 == 0] for lines in plain]  # a stop writes one where it is
    steps = sorted(set(regular[0]) & set(regular[1]))
    common = max(set(checkpoints(calm.out)) & set(checkpoints(killed.out)))
    tensors = 0
    different = [f"metrics at step {step}" for step in steps if plain[0][step] != plain[1][step]]
    for name in ("model.safetensors", "optim.safetensors"):
        a, b = (load_file(run.out / "checkpoints" / f"step-{common}" / name) for run in (calm, killed))
        tensors += len(a)
        different += [f"{name}: {key}" for key in a if key not in b or not torch.equal(a[key], b[key])]
    return {
        "lines_compared": len(steps),
        "lines_missing": len(set(regular[0]) ^ set(regular[1])),
        "tensors_compared": tensors,
        "at_step": common,
        "different": different,
    }


def growth(sizes: list[tuple[float, float, int]]) -> dict[str, Any]:
    """Medians of the second and of the last tenth of the looks at the calm run (the first tenth warms up), and the
    medians of all tenths."""
    tenth = max(1, len(sizes) // 10)
    parts = [sizes[i : i + tenth] for i in range(0, tenth * 10, tenth)]
    course = [[round(median(one[what] for one in part), 1) for part in parts if part] for what in range(3)]
    names = ("resident_mib", "worker_resident_mib", "open_files")
    found: dict[str, Any] = dict(zip(names, course, strict=True))
    return {**found, "growth": {name: round(found[name][-1] / found[name][1] - 1, 4) for name in names}}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of death")
    parser.add_argument("--work", type=Path, default=Path("runs/soak"), help="where the two runs lie")
    args = parser.parse_args()
    if any((args.work / name).exists() for name in ("calm", "killed")):
        parser.error(f"{args.work} holds an earlier soak: remove it, or name another folder with --work")
    args.work.mkdir(parents=True, exist_ok=True)
    found = soak(args.work, args.hours, args.seed)
    print(json.dumps(found, indent=1))
    write_section("reliability.json", "soak", found, f"python -m benchmarks.soak --hours {args.hours:g}")
    flat = all(share < 0.02 for share in found["growth"].values())
    return 0 if flat and not found["different"] and not found["lines_missing"] else 1


if __name__ == "__main__":
    sys.exit(main())
