"""What was tried to break it, and what came of it: benchmarks/results/reliability.json, a section a kind of trial.

python -m benchmarks.reliability fuzz --seconds 300     spoilt files and words for every reader
python -m benchmarks.reliability kills --count 100      deaths of short runs, which go on to their end
python -m benchmarks.reliability checkpoints            what writing them costs the run
python -m benchmarks.soak --hours 2                     adds the section "soak"
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from benchmarks.common import write_section
from hybridssl.checkpoint import Writer
from pretrain import loop
from shards import demo
from tests.pretrain.conftest import TINY
from tests.security.fuzzing import TARGETS, attempt

ROOT = Path(__file__).resolve().parents[1]
NAME = "reliability.json"
ROUND = 200  # inputs at a target before the next one has its turn


def fuzz(seconds: float) -> dict[str, Any]:
    """Rounds over all targets, each with another seed, until the time is up."""
    outcomes = {name: Counter[str]() for name in TARGETS}
    slowest, faults = dict.fromkeys(TARGETS, 0.0), []
    started, seed = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        for name in TARGETS:
            before = time.monotonic()
            try:
                outcomes[name] += attempt(name, ROUND, seed)
            except Exception as error:  # whatever a reader did not foresee is what is looked for
                outcomes[name]["fault"] += 1
                faults.append(f"{name}, seed {seed}: {type(error).__name__}: {str(error)[:200]}")
                print(faults[-1], flush=True)
            slowest[name] = max(slowest[name], time.monotonic() - before)
        seed += 1
    return {
        "inputs": sum(count.total() for count in outcomes.values()),
        "faults": faults,
        "targets": {
            name: {**dict(sorted(count.items())), "slowest_round_s": round(slowest[name], 1)}
            for name, count in outcomes.items()
        },
        "round": ROUND,
        "seeds": seed,
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "seconds": round(time.monotonic() - started),
    }


def kills(count: int) -> dict[str, Any]:
    """Runs of a few steps on synthetic images, killed `count` times (tests/pretrain/kills.py): do they end alike?"""
    with tempfile.TemporaryDirectory() as folder:
        demo.generate(Path(folder) / "demo", samples=120, seed=0, size=48)
        program = [sys.executable, str(ROOT / "tests" / "pretrain" / "kills.py"), folder, "0", str(count)]
        recipe = [*TINY, f"data.train={folder}/demo", "steps=10", "probe.every=5", "probe.images=20"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*program, *recipe], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def checkpoints(rounds: int = 3) -> dict[str, Any]:
    """What writing costs a run: `recipe=demo`, 40 steps, a checkpoint every ten or none; in a thread, or waited for."""
    modes = {"none": (99, False), "in a thread": (10, False), "waited for": (10, True)}
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        demo.generate(out / "demo", samples=400)
        for turn in range(rounds):
            for mode, (every, waits) in modes.items():
                out = Path(folder) / f"{mode}-{turn}"
                keys = ["steps=40", f"save.every={every}", "probe.every=0", "log.every=40", "data.workers=0"]
                with mock.patch.object(Writer, "save", _waiting if waits else Writer.save):
                    code = loop.main(["recipe=demo", f"data.train={folder}/demo", f"out={out}", *keys])
                assert code == 0, f"{mode}: exit code {code}"
                lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                seconds[mode].append(lines[-1]["seconds"])
        size = sum(path.stat().st_size for path in (out / "checkpoints" / "step-40").iterdir())
    times = {
        mode: round(median(a / b for a, b in zip(seconds[mode], seconds["none"], strict=True)), 3)
        for mode in modes
        if mode != "none"
    }
    return {"times_a_run_without": times, "rounds": rounds, "megabytes": round(size / 1e6), "steps_between": 10}


_save = Writer.save


def _waiting(self: Writer, *arguments: Any) -> None:
    _save(self, *arguments)
    self.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["fuzz", "kills", "checkpoints"])
    parser.add_argument("--seconds", type=float, default=300.0, help="of fuzzing, at least (default 300)")
    parser.add_argument("--count", type=int, default=100, help="of deaths (default 100)")
    args = parser.parse_args()
    command = f"python -m benchmarks.reliability {args.section}"
    if args.section == "fuzz":
        found, command = fuzz(args.seconds), f"{command} --seconds {args.seconds:g}"
    elif args.section == "kills":
        found, command = kills(args.count), f"{command} --count {args.count}"
    else:
        found = checkpoints()
    write_section(NAME, args.section, found, command)


if __name__ == "__main__":
    main()
