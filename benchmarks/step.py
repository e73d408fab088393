"""How much slower is a training step than its bare compute, and than the step of others?

    python -m benchmarks.step --size cpu                  # ViT-Ti/16 at 96 px, 4,096 and 65,536 prototypes
    python -m benchmarks.step --size gpu                  # ViT-S, B and L at 2 x 224 + 8 x 96, 65,536, bf16
    python -m benchmarks.step --size cpu --heads          # the heads and losses alone: time and memory

The floor is the student's forward and backward pass on all crops and the teacher's forward pass on the global ones. All
contestants (benchmarks/contestants.py, peers.py) take turns, a step each a round, so that whatever else the machine
does hits all alike. A ratio is the median over the rounds of (seconds of the contestant / seconds of the floor in the
same round). On a GPU also images a second, the share of what the device can do, and memory: what a contestant holds
by itself and the peak of its step, as if it were alone. Others are timed where they are installed and run: `pip install
lightly-train` brings one, a clone of facebookresearch/dinov2 on PYTHONPATH another. Results, after each setting:
benchmarks/results/step-SIZE.json; of --heads, which a GPU computes under bf16 as in a run, heads.json, heads-gpu.json.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import machine, write_results
from benchmarks.contestants import Setting, Step, floor, network, ours
from benchmarks.peers import PEERS
from hybridssl import attention
from hybridssl.objectives import dino
from pretrain import cost, meters
from pretrain.start import keep_freed_memory

OWN = {"floor": floor, "ours": ours}
CONTESTANTS: dict[str, Callable[[Setting, torch.device], Step]] = {**OWN, **PEERS}
WARM_UP = 4  # rounds: kernels are chosen, memory is taken

TINY = ("vit_tiny_patch16_224", 192, 12, 3)
SMALL = ("vit_small_patch16_224", 384, 12, 6)
BASE = ("vit_base_patch16_224", 768, 12, 12)
LARGE = ("vit_large_patch16_224", 1024, 24, 16)
SIZES = {
    "test": [Setting("vit_tiny_patch16_224", 32, 1, 2, 64, 32, 2, batch=4, prototypes=64)],
    "cpu": [Setting(*TINY, 96, 48, 8, batch=32, prototypes=k) for k in (4096, 65536)],
    "gpu": [
        Setting(*SMALL, 224, 96, 8, batch=128, prototypes=65536, precision="bf16"),
        Setting(*BASE, 224, 96, 8, batch=64, prototypes=65536, precision="bf16"),
        Setting(*LARGE, 224, 96, 8, batch=32, prototypes=65536, precision="bf16"),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--heads", action="store_true", help="measure heads and losses alone")
    parser.add_argument("--tokens", type=int, default=4096, help="of --heads")
    parser.add_argument("--prototypes", type=int, default=65536, help="of --heads")
    parser.add_argument("--alone", choices=("ours", "plain"), help=argparse.SUPPRESS)  # a process of --heads
    args = parser.parse_args()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # contestants of many sizes share the GPU
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()  # as our loop does; in one process all contestants have it
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.alone:
        print(peak(args.alone, args.tokens, args.prototypes, device))
        return
    about = {**machine(), "command": f"python -m benchmarks.step {' '.join(sys.argv[1:])}".strip()}
    if args.heads:
        file = "heads-gpu.json" if device.type == "cuda" else "heads.json"
        write_results(file, {**about, **heads(args.tokens, args.prototypes, args.rounds, device)})
        return
    if device.type == "cuda":  # without its kernel some others are slower, for a reason that is not ours
        about["xformers"] = attention.usable(torch.bfloat16, 64, device)
    names = ["floor", *(name for name in args.only if name != "floor")]
    found = []
    for setting in SIZES[args.size]:
        found.append(race(setting, names, args.rounds, device))
        write_results(f"step-{args.size}.json", {**about, "settings": found})


def race(setting: Setting, names: Sequence[str], rounds: int, device: torch.device) -> dict[str, Any]:
    """Every contestant that is installed and runs, a step in turn. Only the floor and we ourselves must."""
    running: dict[str, Entrant] = {}
    left_out: dict[str, str] = {}
    for name in names:
        with sparing(name, running, left_out):
            running[name] = Entrant(CONTESTANTS[name], setting, device)
    retries = 0
    for number in range(-WARM_UP, rounds):
        gc.collect()  # between steps, as the loop does; and what a contestant that failed has left
        if number == 0:
            retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        for name in list(running):
            with sparing(name, running, left_out):
                running[name].turn(timed=number >= 0)
    found: dict[str, Any] = {}
    for name, entrant in running.items():
        pairs = zip(entrant.seconds, running["floor"].seconds, strict=True)
        ratios = [mine / floor for mine, floor in pairs]
        found[name] = {"over_floor": round(statistics.median(ratios), 3), "quartiles": quartiles(ratios)}
        if device.type == "cuda":
            peak = meters.peak(device, setting.precision)
            found[name] |= speed(setting, name, statistics.median(entrant.seconds), peak) | entrant.memory()
        print(f"K {setting.prototypes:,}  {setting.name}  {name:16} {found[name]}", flush=True)
    result = {"setting": asdict(setting), "rounds": rounds, "contestants": found, "left_out": left_out}
    if device.type == "cuda":  # above 0: memory was short, and what was timed is partly how it was searched for
        result["alloc_retries"] = torch.cuda.memory_stats()["num_alloc_retries"] - retries
    return result


class Entrant:
    """A contestant that runs. On a GPU also what it holds (weights, teacher, moments, crops) and what a step adds."""

    def __init__(self, build: Callable[[Setting, torch.device], Step], setting: Setting, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.added = 0  # bytes
        gc.collect()
        before = torch.cuda.memory_allocated()  # 0 without a GPU
        self.step = build(setting, device)
        self.step()  # in which the moments come into being
        gc.collect()
        self.held = torch.cuda.memory_allocated() - before

    def turn(self, timed: bool) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated()  # and itself, between two steps
        start = clock(self.device)
        self.step()
        seconds = clock(self.device) - start
        if timed:
            self.seconds.append(seconds)
            self.added = max(self.added, torch.cuda.max_memory_allocated() - others)

    def memory(self) -> dict[str, float]:
        return {"held_gib": round(self.held / 2**30, 2), "peak_gib": round((self.held + self.added) / 2**30, 2)}


@contextmanager
def sparing(name: str, running: dict[str, Entrant], left_out: dict[str, str]) -> Iterator[None]:
    """What fails in here costs contestant `name` its place, and not the others theirs. Raises what is our own fault."""
    try:
        yield
    except Exception as error:
        if name in OWN:
            raise
        running.pop(name, None)
        left_out[name] = f"{type(error).__name__}: {error}"
        print(f"left out: {name}: {left_out[name]}", flush=True)


def speed(setting: Setting, name: str, seconds: float, peak: float | None) -> dict[str, float]:
    """Images and TFLOP a second of a step, and the share of `peak` (TFLOP/s). All but the floor have the same work."""
    found = {"images_per_s": round(setting.batch / seconds, 1)}
    tera = work(setting, heads=name != "floor") * setting.batch / seconds / 1e12
    return found | {"tflops": round(tera, 1)} | ({"mfu": round(tera / peak, 3)} if peak else {})


def work(setting: Setting, heads: bool) -> float:
    """FLOPs of an image by arithmetic, the same as in a run's log (pretrain/meters.py)."""
    net, head = cost.network(network(setting), 3, setting.global_size), dino.Options(prototypes=setting.prototypes)
    assert net is not None  # all are vision transformers
    widths = (head.prototypes, head.hidden, head.bottleneck) if heads else (0, 0, 0)
    return cost.image_work(cost.Step(net, setting.global_size, setting.local_size, setting.local_count, *widths))


def heads(tokens: int, prototypes: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """The cross-entropy of `tokens` with Sinkhorn targets over `prototypes`: ours against the plain formulas."""
    ratios, steps = [], {name: make_heads(name, tokens, prototypes, device) for name in ("ours", "plain")}
    for number in range(-1, rounds):
        times = {}
        for name, step in steps.items():
            start = clock(device)
            step()
            times[name] = clock(device) - start
        if number >= 0:
            ratios.append(times["ours"] / times["plain"])
    memory = {name: memory_of(name, tokens, prototypes) for name in steps}
    found = {
        "tokens": tokens,
        "prototypes": prototypes,
        "time_over_plain": round(statistics.median(ratios), 3),
        "quartiles": quartiles(ratios),
        "peak_gib": {name: round(value, 3) for name, value in memory.items()},
        "memory_over_plain": round(memory["ours"] / memory["plain"], 4),
    }
    print(found)
    return found


def make_heads(name: str, tokens: int, prototypes: int, device: torch.device, width: int = 256) -> Step:
    from hybridssl.assign import sinkhorn
    from hybridssl.fused import Targets, cross_entropy

    g = torch.Generator().manual_seed(0)
    rows = lambda n: F.normalize(torch.randn(n, width, generator=g), dim=1).to(device)  # noqa: E731
    z, taught, weight, theirs = rows(tokens), rows(tokens), rows(prototypes), rows(prototypes)
    z.requires_grad_()
    weight.requires_grad_()
    share = torch.full((1, tokens), 1 / tokens, device=device)

    def ours() -> Tensor:
        targets = Targets(taught[None], theirs, 0.07, sinkhorn(taught, theirs, 0.07)[None])
        return cross_entropy(z[None], weight, targets, 0.1, share)

    def plain() -> Tensor:
        with torch.no_grad():
            q = torch.exp((taught @ theirs.T - 1) / 0.07)
            for _ in range(3):
                q /= q.sum(dim=0)
                q /= q.sum(dim=1, keepdim=True)
        log_p = F.log_softmax(z @ weight.T / 0.1, dim=1)
        return (-(q * log_p).sum(dim=1) * share[0]).sum()

    def step() -> tuple[Tensor | None, Tensor | None]:
        z.grad = weight.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = ours() if name == "ours" else plain()
        loss.backward()
        return z.grad, weight.grad

    return step


def memory_of(name: str, tokens: int, prototypes: int) -> float:
    """GiB that one step needs beyond its inputs, in a process of its own: the peak never goes down in one."""
    command = [sys.executable, "-m", "benchmarks.step", "--alone", name]
    command += ["--tokens", str(tokens), "--prototypes", str(prototypes)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(name: str, tokens: int, prototypes: int, device: torch.device) -> float:
    step = make_heads(name, tokens, prototypes, device)
    make_heads(name, 64, 128, device)()  # what libraries allot for themselves, once
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    before = high_water()
    step()
    return high_water() - before


def high_water() -> float:
    """GiB: the most that this process ever held. (ru_maxrss would start from what the parent held.)"""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [round(values[0], 3)] * 2
    low, _, high = statistics.quantiles(values, n=4)
    return [round(low, 3), round(high, 3)]


if __name__ == "__main__":
    main()
