"""The student's pass, forward and backward: crops of both sizes at once or one size after the other, and what
stochastic depth saves. Decides the default of `efficiency.packed`.

    python -m benchmarks.packed [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from dataclasses import dataclass

import timm.layers
import torch

from benchmarks.common import machine, write_results
from hybridssl.backbone import Backbone, BackboneOptions, Crops, build
from hybridssl.efficiency import EfficiencyOptions, apply

WARM_UP = 3  # rounds: a kernel is chosen, memory is taken


@dataclass(frozen=True)
class Setting:
    """A ViT and the crops of `images` images: 2 global ones and 8 local ones of each."""

    name: str
    global_size: int
    local_size: int
    images: int
    drop_path: float = 0.0

    def __str__(self) -> str:
        depth = f", drop path {self.drop_path}" if self.drop_path else ""
        return f"{self.name}, 2 x {self.global_size} + 8 x {self.local_size}, {self.images} images{depth}"


CPU = (
    Setting("vit_tiny_patch16_224", 96, 48, 8),
    Setting("vit_tiny_patch16_224", 224, 96, 2),
    Setting("vit_tiny_patch16_224", 96, 48, 8, drop_path=0.4),
)
GPU = tuple(
    Setting(f"vit_{size}_patch16_224", 224, 96, images, drop)
    for size, images in (("small", 64), ("base", 32), ("large", 16))
    for drop in (0.0, 0.4)
)


def step(backbone: Backbone, crops: list[Crops], packed: bool) -> None:
    """One forward and backward pass over all crops."""
    apply(backbone, EfficiencyOptions(packed=packed))
    bf16 = torch.autocast("cuda", torch.bfloat16) if crops[0].images.is_cuda else contextlib.nullcontext()
    with bf16:
        loss = sum(one.cls.float().square().mean() + one.patches.float().mean() for one in backbone.see(crops))
    loss.backward()  # type: ignore[union-attr]
    backbone.zero_grad(set_to_none=True)


def measure(setting: Setting, device: str, rounds: int) -> dict[str, float]:
    """Seconds of a step, medians of `rounds`, interleaved: {"packed, fused attention": s, ...}.

    On a CPU they are of processor time, on one thread: other programs may be running.
    """
    crops = [
        Crops(torch.randn(count * setting.images, 3, side, side, device=device))
        for count, side in ((2, setting.global_size), (8, setting.local_size))
    ]
    ways = {}
    for fused in (True, False) if device == "cpu" else (True,):
        timm.layers.set_fused_attn(fused)
        options = BackboneOptions(name=setting.name, drop_path=setting.drop_path)
        backbone = build(options, 3, setting.global_size).to(device)
        for packed in (False, True):
            kind = f"{'packed' if packed else 'separate'}, {'fused' if fused else 'plain'} attention"
            ways[kind] = (backbone, packed)
    taken: dict[str, list[float]] = {kind: [] for kind in ways}
    for _ in range(WARM_UP + rounds):
        for kind, (backbone, packed) in ways.items():
            taken[kind].append(_seconds(backbone, crops, packed))
    return {kind: statistics.median(seconds[WARM_UP:]) for kind, seconds in taken.items()}


def _seconds(backbone: Backbone, crops: list[Crops], packed: bool) -> float:
    on_gpu = crops[0].images.is_cuda
    clock, wait = (time.perf_counter, torch.cuda.synchronize) if on_gpu else (time.process_time, lambda: None)
    wait()
    start = clock()
    step(backbone, crops, packed)
    wait()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    found = {}
    for setting in GPU if device == "cuda" else CPU:
        found[str(setting)] = seconds = measure(setting, device, rounds)
        print(setting, *(f"  {kind}: {value * 1e3:.1f} ms" for kind, value in seconds.items()), sep="\n", flush=True)
    write_results(f"packed-{device}.json", {"seconds": found, "rounds": rounds, **machine()})


if __name__ == "__main__":
    main()
