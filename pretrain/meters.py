"""How fast a run is, how well it uses its device, how much memory it takes: measured from one log point to the next."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from hybridssl.student import Student
from pretrain import cost
from pretrain.curriculum import curriculum
from pretrain.recipe import Recipe

# Dense bfloat16 with sums in float32, TFLOP/s, as the makers state it; the first name that fits counts.
PEAKS = {
    r"B200": 2250,
    r"H200": 989,
    r"H100 NVL": 835,
    r"H100 PCIe": 756,
    r"H100": 989,
    r"A100": 312,
    r"L40S": 362,
    r"L4\b": 121,
    r"RTX 4090(?! Laptop)": 165,
    r"RTX 3090(?! Laptop)": 71,
}


class Meter:
    """Images a second, share of the time without data, TFLOP/s, share of the device's peak, memory."""

    def __init__(self, batch: int, work: Mapping[int, float], peak: float | None, world: int = 1) -> None:
        """batch: images a step over all processes; work: FLOPs an image, by the side of its global views in pixels
        (empty: unknown); peak: TFLOP/s of one device (None: unknown)."""
        self.batch, self.work, self.peak, self.world = batch, work, peak, world
        self.side = 0  # of the last step
        self.restart()

    def restart(self) -> None:
        self.steps, self.done = 0, 0.0
        self.waited, self.started = 0.0, time.perf_counter()

    def step(self, side: int) -> None:
        """Take note of a step whose global views have this side."""
        self.side = side
        self.steps += 1
        self.done += self.work.get(side, 0.0) * self.batch

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is time without data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def seconds(self) -> float:
        """Since the last `restart`."""
        return time.perf_counter() - self.started

    def read(self) -> dict[str, float]:
        """Of the steps since the last `restart`. `tflops` and `mfu` are those of one device, where they are known."""
        seconds = self.seconds()
        speed = self.steps * self.batch / seconds
        found = {"images_per_s": speed, "data_wait": self.waited / seconds, "memory_gib": memory() / 2**30}
        if self.done:
            found["tflops"] = self.done / seconds / self.world / 1e12
            if self.peak:
                found["mfu"] = found["tflops"] / self.peak
        return found


class Pace:
    """The time that a run still takes, whose first `small` steps have half-size crops and so are faster.

    What a step at full size takes is measured once there is one; until then it is reckoned from the FLOPs, so too long
    where the loader, and not the model, is what takes the time.
    """

    def __init__(
        self, steps: int, small: int, work: Mapping[int, float], lines: Iterable[Mapping[str, Any]], begun: int = 0
    ) -> None:
        """work: as for `Meter`; lines: what was logged before; begun: the step at which the run began, of a branch."""
        self.steps, self.small, self.begun = steps, small, begun
        few, many = (work[side] for side in (min(work), max(work))) if work else (1.0, 4.0)  # pixels
        self.dearer = many / few
        small_ones = [line for line in lines if line["step"] <= small and "seconds" in line]
        self.turn = (small_ones[-1]["step"], small_ones[-1]["seconds"]) if small_ones else (begun, 0.0)

    def left(self, step: int, seconds: float) -> float:
        """Seconds that are left after `step` steps, which took `seconds`."""
        if step <= self.small:
            self.turn = step, seconds
            return seconds / (step - self.begun) * (self.small - step + self.dearer * (self.steps - self.small))
        at, spent = self.turn
        return (seconds - spent) / (step - at) * (self.steps - step)


def text(line: Mapping[str, float]) -> str:
    """A line of the log for the eye: "812 images/s, 3% waiting for data, 310 TFLOP/s (31% of the peak), 41.2 GiB"."""
    parts = [f"{line['images_per_s']:.0f} images/s", f"{line['data_wait']:.0%} waiting for data"]
    if "tflops" in line:
        parts.append(flops(line["tflops"]) + (f" ({line['mfu']:.0%} of the peak)" if "mfu" in line else ""))
    return ", ".join([*parts, f"{line['memory_gib']:.1f} GiB"])


def flops(tera: float) -> str:
    """310.2 -> "310 TFLOP/s", 0.0341 -> "34.1 GFLOP/s"."""
    return f"{tera:.3g} TFLOP/s" if tera >= 1 else f"{1000 * tera:.3g} GFLOP/s"


def memory() -> float:
    """Bytes at their highest so far: of tensors on the GPU, or of this process where there is none."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak(device: torch.device, precision: str) -> float | None:
    """TFLOP/s that `device` can reach in bf16; None where it is not known or the run is in another precision."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(value) for pattern, value in PEAKS.items() if re.search(pattern, name)), None)


def work(recipe: Recipe, learner: Student, channels: int) -> dict[int, float]:
    """FLOPs that one image costs: the student there and back on all views, the teacher on the global ones, their heads.

    By the side of the global views, of which a curriculum has two. What the method needs, not what is done: nothing
    that is computed twice to save memory counts twice. The small heads of labels and guides are left out. Empty for
    what is no self-distillation of a vision transformer.
    """
    objectives = learner.each().values()
    net = cost.network(recipe.backbone, channels, recipe.views.global_size)
    if net is None or "visible" in learner.views or not any(o.taught for o in objectives):
        return {}
    heads = [o.options for o in objectives if hasattr(o.options, "prototypes")]
    hidden = any(o.masked and hasattr(o.options, "prototypes") for o in objectives)
    low, high = recipe.views.mask_ratio
    step = cost.Step(
        network=net,
        global_size=recipe.views.global_size,
        local_size=recipe.views.local_size,
        local_count=recipe.views.local_count if "local" in learner.views else 0,
        prototypes=max((o.prototypes for o in heads), default=0),
        hidden=max((o.hidden for o in heads), default=0),
        bottleneck=max((o.bottleneck for o in heads), default=0),
        masked=recipe.views.mask_probability * (low + high) / 2 if hidden else 0.0,
        short=1 - recipe.views.mask_probability if recipe.views.left_out else 0.0,
        left_out=recipe.views.left_out,
        clean=recipe.stream.labelled_fraction if "clean" in learner.views else 0.0,
    )
    sizes = curriculum(recipe, net.patch)
    steps = [replace(step, global_size=v.global_size, local_size=v.local_size) for v in (sizes.small, sizes.full)]
    return {one.global_size: cost.image_work(one) for one in steps}
