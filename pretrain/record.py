"""What a run shows and leaves behind: the bar, metrics.jsonl, quarantine.jsonl, checkpoints, the report."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import save_file
from torch import Tensor

from hybridssl import dist, run
from hybridssl.recipe import to_dict, to_yaml
from hybridssl.student import Student
from hybridssl.text import beside, class_embeddings
from hybridssl.types import Batch
from pretrain.data import selected
from pretrain.recipe import Recipe
from shards.index import Index
from shards.stream import Quarantine

RESUME_LATER = 85  # exit code of a run that was asked to stop and can go on


class StopSignal:
    """SIGINT and SIGTERM ask for an orderly stop after the step in hand; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def share(self) -> None:
        """All ranks stop at the same step, whichever was asked."""
        self.asked = not dist.all_agree(not self.asked)


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
        self.quarantine = Quarantine(out / "quarantine.jsonl", recipe.stream, len(self.selected))
        self._clear()

    def __enter__(self) -> Record:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

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
        self.sums: dict[str, Tensor | float] = {}
        self.steps, self.skipped, self.waited, self.started = 0, 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is time without data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

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
        accepted: bool,
        schedule: Mapping[str, float],
        health: Mapping[str, Tensor],
        line_due: bool,
    ) -> None:
        """Take note of one step; `step` counts it already. Writes a line when `line_due`."""
        for batch in batches:
            if batch.bad:
                self.quarantine.add(batch.bad, seen=step * self.recipe.batch.size)
        if accepted:
            values = {f"loss/{name}": loss for name, loss in losses.items()}
            for name, value in {**values, "loss": total, "grad_norm": norm}.items():
                self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.steps += 1
        self.skipped += not accepted
        self.bar.update(self.task, completed=step)
        if line_due:
            line = self._line(step, schedule, health)
            self.write(step, line)
            self._show(step, line)
            self._clear()

    def _line(self, step: int, schedule: Mapping[str, float], health: Mapping[str, Tensor]) -> dict[str, float]:
        taken = max(self.steps - self.skipped, 1)
        averaged = {name: torch.as_tensor(value) / taken for name, value in self.sums.items()} | dict(health)
        # One reduction for the whole line; ranks see different images, so each holds a part of the mean.
        packed = torch.stack([v.detach().float().to(self.accelerator.device) for v in averaged.values()])
        packed = dist.all_reduce_sum(packed) / self.accelerator.num_processes
        seconds = time.perf_counter() - self.started
        self.seconds += seconds
        images = step * self.recipe.batch.size
        return {
            "images": images,
            "epoch": images / len(self.selected),
            "seconds": round(self.seconds, 2),
            **schedule,
            **dict(zip(averaged, packed.tolist(), strict=True)),
            "skipped": self.skipped,
            "images_per_s": self.steps * self.recipe.batch.size / seconds,
            "data_wait": self.waited / seconds,
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
        speed, wait = line["images_per_s"], line["data_wait"]
        news = f"{speed:.0f} images/s  {losses}" + (f"  waiting for data {wait:.0%}" if wait > 0.2 else "")
        self.bar.update(self.task, news=news)
        if self.main and self.bar.disable:
            left = (self.recipe.steps - step) * self.recipe.batch.size / speed
            print(f"step {step}/{self.recipe.steps}  {news}  {left / 60:.1f} min left", flush=True)

    def say(self, text: str) -> None:
        if self.main:
            self.bar.console.print(text, highlight=False, markup=False)

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
            "index": recipe.data.train,
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
