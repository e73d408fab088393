"""A program that kills runs and lets them go on: one process imports everything, and forks the runs.

    python tests/pretrain/kills.py FOLDER SEED COUNT ARGUMENT...      prints a line of JSON

First an uninterrupted run, then COUNT deaths by SIGKILL: at each of `POINTS`, in the middle of what must not be left
half done, then at random moments. Each run goes on until it is through, and must equal the first bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from hybridssl import checkpoint, export, student
from pretrain import report
from pretrain.loop import main
from tests.pretrain.forks import ends, forked


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half(write: Callable[..., Any]) -> Callable[..., Any]:
    """Writes a file, leaves half of it, and dies."""

    def broken(tensors: dict, path: Path, **more: Any) -> None:
        write(tensors, path, **more)
        os.truncate(path, path.stat().st_size // 2)
        die()

    return broken


def half_averaged(follow: Callable[..., Any]) -> Callable[..., Any]:
    def broken(mine: list, theirs: list, *rest: Any) -> None:
        follow(mine[: len(mine) // 2], theirs[: len(mine) // 2], *rest)
        die()

    return broken


# Where a death would hurt most: what is replaced, and how it dies there.
POINTS: dict[str, tuple[object, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = {
    "a checkpoint half written": (checkpoint, "save_file", half),
    "written, not yet synced": (checkpoint, "sync", lambda _: die),
    "its state not yet written": (checkpoint, "write_text", lambda _: die),
    "not yet renamed": (os, "rename", lambda _: die),
    "old ones not yet removed": (checkpoint, "_prune", lambda _: die),
    "half averaged": (student, "_follow", half_averaged),
}


def run(arguments: list[str], log: Path, point: str | None = None, after: int = 0) -> int:
    """A forked run; the child's process id. It dies at call number `after` of `point`."""

    def dying() -> int:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(report, "write", lambda folder, *_: folder / "report.html"))
            if point:
                owner, name, breaks = POINTS[point]
                whole, left = getattr(owner, name), [after]

                def sometimes(*args: Any, **more: Any) -> Any:
                    left[0] -= 1
                    return (whole if left[0] >= 0 else breaks(whole))(*args, **more)

                stack.enter_context(mock.patch.object(owner, name, sometimes))
            return main(arguments)

    return forked(dying, log)


def same(a: Path, b: Path) -> str:
    """What differs between two finished runs; "" when nothing does."""
    kept = [sorted(p.name for p in (out / "checkpoints").iterdir()) for out in (a, b)]
    if kept[0] != kept[1]:
        return f"checkpoints {kept}"
    lines = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (a, b)]
    timed = ("seconds", "images_per_s", "data_wait", "memory_gib", "tflops", "mfu", "eta")
    plain = [[{k: v for k, v in line.items() if k not in timed} for line in of] for of in lines]
    if plain[0] != plain[1]:
        return "metrics.jsonl"
    newest = (a / "checkpoints" / "latest").read_text()
    for name in ("model.safetensors", "optim.safetensors"):
        x, y = (load_file(out / "checkpoints" / newest / name) for out in (a, b))
        if x.keys() != y.keys() or any(not torch.equal(x[key], y[key]) for key in x):
            return name
    return ""


def work(folder: Path, seed: int, count: int, arguments: list[str]) -> dict[str, Any]:
    chance, log, calm = random.Random(seed), folder / "log.txt", folder / "calm"
    start = time.monotonic()
    assert ends(run([*arguments, f"out={calm}"], log)) == 0, log.read_text()
    lasts = time.monotonic() - start
    points: list[str | None] = [*POINTS, *[None] * count]
    deaths: dict[str, int] = {}
    finished, different, out = 0, [], folder / "run-0"
    spared = 0  # runs in a row that did not come to the point where they were to die
    while sum(deaths.values()) < count or out.exists():  # the last one goes on to its end
        dying = sum(deaths.values()) < count
        point = points[sum(deaths.values())] if dying else None
        child = run([*arguments, f"out={out}"], log, point, chance.randrange(3))
        if dying and not point:
            time.sleep(chance.uniform(0, 1.1 * lasts))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        code = ends(child)
        if code == -signal.SIGKILL:
            name = point or "at random"
            deaths[name] = deaths.get(name, 0) + 1
            spared, lasts = 0, lasts * (1.0 if point else 1.1)
        elif code == 0:
            finished, spared = finished + 1, spared + (point is not None)
            lasts *= 0.8 if dying and not point else 1.0  # other work may have slowed the first run, or slow these
            if difference := same(calm, out):
                different.append(f"{out.name}: {difference}")
            out = folder / f"run-{finished}"
            if spared > 5:
                different.append(f"no run dies at '{point}': it is never reached")
                break
        else:
            different.append(f"{out.name}: exit code {code}")
            break
    return {"deaths": deaths, "finished": finished, "different": different}


def exports(folder: Path, seed: int) -> list[str]:
    """Exports that die, the first in the middle of the weights: what is there is whole, and they can be done again."""
    chance, wrong, whole = random.Random(seed), [], folder / "models" / "whole"
    export.export(folder / "calm", whole)
    names = sorted(p.name for p in whole.iterdir())
    for number in range(4):
        out = whole.with_name(f"killed-{number}")

        def dying(number: int = number, out: Path = out) -> int:
            write = half(export.save_file) if number == 0 else export.save_file
            with mock.patch.object(export, "save_file", write):
                export.export(folder / "calm", out)
            return 0

        child = forked(dying)
        if number:
            time.sleep(chance.uniform(0, 0.5))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        ends(child)
        if out.exists() and sorted(p.name for p in out.iterdir()) != names:
            wrong.append(f"{out.name} is half an export")
        export.export(folder / "calm", out, overwrite=True)
        if any((out / name).read_bytes() != (whole / name).read_bytes() for name in names if "README" not in name):
            wrong.append(f"{out.name} is another export")
    return wrong


if __name__ == "__main__":
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    where, number, deaths_wanted, *given = sys.argv[1:]
    found = work(Path(where), int(number), int(deaths_wanted), given)
    found["exports"] = exports(Path(where), int(number))
    print(json.dumps(found))
