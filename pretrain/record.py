"""What a run shows and leaves behind: the bar, metrics.jsonl, quarantine.jsonl, checkpoints, the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import save_file
from torch import Tensor

from hybridssl import dist, run
from hybridssl.errors import UserError
from hybridssl.recipe import to_dict, to_yaml
from hybridssl.student import Student
from hybridssl.text import beside, class_embeddings
from hybridssl.types import Batch
from pretrain import meters
from pretrain.data import selected
from pretrain.profiling import NEEDED, Profiler
from pretrain.recipe import Recipe
from shards.index import Index
from shards.stream import Quarantine

RESUME_LATER = 85  # exit code of a run that was asked to stop and can go on


class Record:
    """Writes the run folder (the main process) and shows progress. Values between two logged steps are averaged."""

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, out: Path, index: Index, step: int, learner: Student
    ) -> None:
        self.recipe, self.accelerator, self.out, self.index = recipe, accelerator, out, index
        self.main = accelerator.is_main_process
        self.selected = selected(recipe, index)
        self.seconds = _cut_metrics(out / "metrics.jsonl", step) if self.main else 0.0
        if self.main:
            self._begin(learner, fresh=step == 0)
        if recipe.log.trackers:
            accelerator.init_trackers(recipe.name, config=_flat(to_dict(recipe)))
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"),
            console=self.console,
            disable=not (self.main and self.console.is_terminal),
        )
        self.task = self.bar.add_task(recipe.name, total=recipe.steps, completed=step, news="")
        self.meter = self._meter(learner)
        self.profiler = self._profiler(recipe.steps - step)
        self.quarantine = Quarantine(out / "quarantine.jsonl", recipe.stream, len(self.selected))
        self._clear()

    def __enter__(self) -> Record:
        self.bar.start()
        if self.profiler:
            self.profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.profiler:
            self.profiler.stop()
        self.bar.stop()

    def _meter(self, learner: Student) -> meters.Meter:
        recipe, here = self.recipe, self.accelerator
        work = meters.work(recipe, learner, self.index.channels)
        return meters.Meter(recipe.batch.size, work, meters.peak(here.device, here.mixed_precision), here.num_processes)

    def _profiler(self, steps: int) -> Profiler | None:
        if not (self.recipe.profile and self.main):
            return None
        if steps < NEEDED:
            raise UserError(f"profile=true needs {NEEDED} steps, and {steps} are left of this run: raise steps=")
        return Profiler(self.out / "profile")

    def _begin(self, learner: Student, fresh: bool) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        run.write_text(self.out / "recipe.yaml", to_yaml(self.recipe))
        # Digests of every image the run may read: evaluation refuses a test image that is among them.
        save_file({"digest": self.index.column("digest")[self.selected]}, self.out / "pretraining.safetensors")
        labels = learner.each().get("labels")
        if fresh and labels is not None:
            kept = {"initial": labels.get_parameter("weight").detach().float().cpu().numpy().copy()}
            if self.recipe.objectives["labels"].init == "text":  # type: ignore[attr-defined]
                words = class_embeddings(beside(self.recipe.text, self.index.root), self.index.classes)
                assert words is not None  # or the head could not have started from them
                kept["text"] = words.numpy()
            names = {"classes": json.dumps(self.index.classes)}
            save_file(kept, self.out / "prototypes.safetensors", metadata=names)

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps, self.skipped = 0, torch.zeros((), device=self.accelerator.device)
        self.meter.restart()

    def due(self, step: int) -> bool:
        """Is there a line to write? At checkpoints too, so that a resumed run writes the same lines."""
        return step % self.recipe.log.every == 0 or step % self.recipe.save.every == 0 or step == self.recipe.steps

    def step(
        self,
        step: int,
        batches: Sequence[Batch],
        losses: Mapping[str, Tensor],
        total: Tensor,
        norm: Tensor,
        refused: Tensor,
        schedule: Mapping[str, float],
        health: Mapping[str, Tensor],
        line_due: bool,
    ) -> None:
        """Take note of one step; `step` counts it already. Writes a line when `line_due`.

        refused: scalar on the device, above 0 where the step was not taken. It is read with the line, and not before:
        the host must not wait for the device in each step.
        """
        for batch in batches:
            if batch.bad:
                self.quarantine.add(batch.bad, seen=step * self.recipe.batch.size)
        for name, value in {**{f"loss/{k}": v for k, v in losses.items()}, "loss": total, "grad_norm": norm}.items():
            taken = torch.where(refused > 0, 0.0, value.detach().float())
            self.sums[name] = self.sums[name] + taken if name in self.sums else taken
        self.steps += 1
        self.skipped = self.skipped + (refused > 0)
        if self.profiler and (told := self.profiler.step()):
            self.say(told)
        self.bar.update(self.task, completed=step)
        if line_due:
            line = self._line(step, schedule, health)
            self.write(step, line)
            self._show(step, line)
            self._clear()

    def _line(self, step: int, schedule: Mapping[str, float], health: Mapping[str, Tensor]) -> dict[str, float]:
        taken = (self.steps - self.skipped).clamp_min(1)
        averaged = {name: value / taken for name, value in self.sums.items()} | dict(health)
        averaged["skipped"] = self.skipped
        # One reduction for the whole line; ranks see different images, so each holds a part of the mean.
        packed = torch.stack([v.detach().float().to(self.accelerator.device) for v in averaged.values()])
        packed = dist.all_reduce_sum(packed) / self.accelerator.num_processes
        values = dict(zip(averaged, packed.tolist(), strict=True))  # here the host waits for the device
        self.seconds += self.meter.seconds()
        images = step * self.recipe.batch.size
        return {
            "images": images,
            "epoch": images / len(self.selected),
            "seconds": round(self.seconds, 2),
            **schedule,
            **values,
            "skipped": round(values["skipped"]),
            **self.meter.read(self.steps),
            "eta": round(self.seconds / step * (self.recipe.steps - step), 1),  # seconds
        }

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One object to metrics.jsonl, and to the trackers."""
        if self.main:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        if self.recipe.log.trackers:
            self.accelerator.log(dict(values), step=step)

    def _show(self, step: int, line: Mapping[str, float]) -> None:
        losses = "  ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in line.items() if k.startswith("loss/"))
        news = f"{meters.text(line)}  {losses}"
        self.bar.update(self.task, news=news)
        if self.main and self.bar.disable:
            print(f"step {step}/{self.recipe.steps}  {news}  {line['eta'] / 60:.1f} min left", flush=True)

    def say(self, text: str) -> None:
        if self.main:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def save(self, step: int, learner: Student, teacher: Student, optimizer: torch.optim.Optimizer) -> None:
        if self.main:
            run.save(self.out, self._state(step, learner), learner, teacher, optimizer, self.recipe.save.keep)
        self.accelerator.wait_for_everyone()

    def _state(self, step: int, learner: Student) -> run.RunState:
        recipe, index = self.recipe, self.index
        backbone = {
            "options": to_dict(recipe.backbone),
            "channels": index.channels,
            "image_size": recipe.views.global_size,
            "mean": list(recipe.views.mean),
            "std": list(recipe.views.std),
        }
        images = step * recipe.batch.size
        data = {
            "index": recipe.data.sets[0] if len(recipe.data.sets) == 1 else list(recipe.data.sets),
            "index_sha256": index.sha256,
            "splits": list(recipe.data.splits),
            "samples": len(self.selected),
            "position": images,
            "sources": list(index.sources),
            "classes": list(index.classes),
            "synthetic": index.synthetic,
        }
        return run.RunState(step, images, to_dict(recipe), backbone, data, _machine(self.accelerator))

    def finish(self, step: int) -> int:
        """Last words, the report, and the exit code."""
        self.accelerator.wait_for_everyone()  # gloo aborts now and then when a rank leaves early
        self.accelerator.end_training()
        if step < self.recipe.steps:
            self.say(f"stopped at step {step} of {self.recipe.steps}, checkpoint written; the same command goes on")
            return RESUME_LATER
        if self.main:
            from pretrain import report  # scikit-learn, which training itself does not need

            page = report.write(self.out)
            print(f"done: {step} steps, {step * self.recipe.batch.size:,} images\nreport: {page}")
            print(f"next: python -m hybridssl export {self.out} --out models/{self.recipe.name}")
        return 0


def _machine(accelerator: Accelerator) -> str:
    """ "2 CPU cores" or "NVIDIA H100 x 4"."""
    if accelerator.device.type == "cuda":
        return f"{torch.cuda.get_device_name(accelerator.device)} x {accelerator.num_processes}"
    return f"{torch.get_num_threads() * accelerator.num_processes} CPU cores"


def _cut_metrics(path: Path, step: int) -> float:
    """Drop lines after `step`, which a resumed run writes again; returns the seconds spent up to it."""
    if not path.is_file():
        return 0.0
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the last line of a killed run
            continue
        if line["step"] <= step:
            lines.append(line)
    run.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return max((line.get("seconds", 0.0) for line in lines), default=0.0)


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted keys with scalar values, as trackers want their configuration."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{path}{key}.")
        else:
            flat[path + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
