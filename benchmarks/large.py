"""An index of ten million samples: how soon does a run start, and how much memory does a worker take?

A part of `python -m benchmarks.loader`. Start-up (open, select, order) and the first sample of an arbitrary position,
by the clock and in CPU time, in a fresh process; the memory that a forked worker has written for itself after a
thousand positions far apart, and its resident set, with all that it shares with its parent and the page cache (without
torch, which this process does not load). The index is made up, its tars are holes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

SAMPLES, SHARDS = 10_000_000, 2_000
FAR = 7_654_321_098  # position
RUNS = 5


def figures(folder: Path) -> dict[str, Any]:
    """Medians over fresh processes."""
    make(folder)
    command = [sys.executable, "-m", "benchmarks.large", str(folder)]
    runs = [json.loads(subprocess.check_output(command)) for _ in range(RUNS)]
    shutil.rmtree(folder)
    return {"samples": SAMPLES, "shards": SHARDS, "runs": RUNS} | {
        name: median(run[name] for run in runs) for name in runs[0]
    }


def make(folder: Path) -> Path:
    """An index of SAMPLES made-up samples, half of them labelled."""
    from safetensors.numpy import save_file

    from shards.format import FORMAT, SPLITS, VERSION

    folder.mkdir()
    each = SAMPLES // SHARDS
    place = np.arange(SAMPLES, dtype=np.int64) % each * 10_240
    member = np.stack([place + 512, np.full(SAMPLES, 9_000)], axis=1)
    label = np.where(np.arange(SAMPLES) % 2, np.arange(SAMPLES) // 2 % 40, -1).astype(np.int32)
    none = np.zeros((SAMPLES, 2), np.int64)
    columns = {"image": member, "json": none, "mask": none, "txt": none, "label": label}
    columns |= {"source": np.zeros(SAMPLES, np.int32), "split": np.ones(SAMPLES, np.int8)}
    columns |= {"group": np.arange(SAMPLES), "digest": np.arange(SAMPLES)}
    columns |= {"keys": np.full(8 * SAMPLES, 48, np.uint8), "key_at": np.arange(SAMPLES + 1) * 8}
    save_file({name: np.ascontiguousarray(values) for name, values in columns.items()}, folder / "index.safetensors")
    shards = []
    for i in range(SHARDS):
        name, size = f"shard-{i:06d}.tar", each * 10_240
        with open(folder / name, "wb") as file:
            file.truncate(size)
        shards.append({"name": name, "samples": each, "bytes": size, "sha256": "0" * 64})
    header = {
        "format": FORMAT,
        "version": VERSION,
        "created_by": "",
        "synthetic": True,
        "in_place": True,
        "channels": 3,
    }
    header |= {
        "samples": SAMPLES,
        "shards": shards,
        "sources": ["a"],
        "vocabulary": {"a": [f"c{k:02d}" for k in range(40)]},
    }
    header |= {"splits": list(SPLITS), "columns_sha256": "0" * 64}
    (folder / "index.json").write_text(json.dumps(header))
    return folder


def measure(folder: Path) -> dict[str, float]:
    from shards import Index, Order, StreamOptions

    times = {}
    for name, share in (("plain", 0.0), ("labelled", 0.25)):
        start, cpu = time.perf_counter(), time.process_time()
        index = Index.open(folder)
        order = Order(index, index.select(), StreamOptions(labelled_fraction=share))
        started = time.perf_counter()
        for position in range(FAR, FAR + 4):  # with labelled slots, one of these is one
            order(position)
        times[f"{name}: start-up, s"] = round(started - start, 3)
        times[f"{name}: start-up and seek, s of CPU time"] = round(time.process_time() - cpu, 3)
        times[f"{name}: seek, s"] = round(time.perf_counter() - started, 3)
        times[f"{name}: worker's own memory, MB"] = in_a_fork(lambda: walk(index, order), "Private_Dirty")  # noqa: B023
        times[f"{name}: worker's resident set, MB"] = in_a_fork(lambda: walk(index, order), "Rss")  # noqa: B023
    return times


def walk(index: Any, order: Any) -> None:
    for position in range(0, FAR, FAR // 1000):
        number = order(position)[1]
        index.shard_of(number), index.column("label")[number]


def in_a_fork(work: Callable[[], None], field: str) -> float:
    """MB of memory, by /proc, of a forked process after `work`."""
    read, write = os.pipe()
    if not os.fork():
        work()
        os.write(write, str(sum(smaps(field))).encode())
        os._exit(0)
    os.wait()
    return round(int(os.read(read, 32)) / 1000)


def smaps(field: str) -> Iterator[int]:
    """Kilobytes of every line of this name."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(field):
            yield int(line.split()[1])


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
