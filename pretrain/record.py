"""What a run shows and leaves behind: the bar, metrics.jsonl, quarantine.jsonl, skipped.jsonl, the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from safetensors.numpy import save_file
from torch import Tensor

from hybridssl import dist, sharding
from hybridssl.errors import UserError
from hybridssl.files import write_text
from hybridssl.recipe import to_dict, to_yaml
from hybridssl.schedule import first_step
from hybridssl.student import Student
from hybridssl.text import beside, class_embeddings
from hybridssl.types import Batch
from pretrain import branch, meters
from pretrain.alarms import alarms, thinned
from pretrain.curriculum import small_steps
from pretrain.data import selected
from pretrain.journal import Journal
from pretrain.profiling import NEEDED, Profiler
from pretrain.recipe import Recipe
from pretrain.stop import ENOUGH, RESUME_LATER
from shards.index import Index
from shards.stream import Quarantine
from shards.terminal import Terminal

STOPPED = "stopped"  # in the run folder: asked to stop, and can go on. Launchers hide the exit code


class Bar(Progress):
    """The bar, and the news on lines of their own: beside it they would push it out of a narrow terminal."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield from (Text(task.fields["news"]) for task in self.tasks if task.fields["news"])


class Record:
    """Writes the run folder (the main process) and shows progress. Values between two logged steps are averaged."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        out: Path,
        index: Index,
        step: int,
        learner: Student,
        begun: int = 0,
    ) -> None:
        """step: after which the run goes on; begun: that at which it began, 0 but for a branch."""
        self.recipe, self.accelerator, self.out, self.index = recipe, accelerator, out, index
        self.main = accelerator.is_main_process
        self.selected = selected(recipe, index)
        self.metrics, self.refusals = Journal(out / "metrics.jsonl"), Journal(out / "skipped.jsonl")
        self.lines = self.metrics.cut(step) if self.main else []
        self.seconds = max((line.get("seconds", 0.0) for line in self.lines), default=0.0)
        self.alarmed: set[str] = set()
        fresh = step == begun
        if recipe.profile and fresh and recipe.steps - step < NEEDED:  # in all processes, before anything is written
            left = f"{recipe.steps - step} are left of this run"
            raise UserError(f"profile=true needs {NEEDED} steps, and {left}: raise steps=, or leave profile out")
        labels = learner.each().get("labels")  # all processes hold a part of its prototypes where they are sharded
        prototypes = None if labels is None else sharding.whole(labels.get_parameter("weight").detach())
        if self.main:
            self.refusals.cut(step)
            self._begin(prototypes, fresh)
        if recipe.log.trackers:
            accelerator.init_trackers(recipe.name, config=_flat(to_dict(recipe)))
        self.console = Terminal(stderr=True)
        self.bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (self.main and self.console.is_terminal),
        )
        self.task = self.bar.add_task(recipe.name, total=recipe.steps, completed=step, news="")
        self.small = small_steps(recipe)
        self.turns = {self.small, *(first_step(o.start, recipe.steps) for o in recipe.objectives.values())}
        work = meters.work(recipe, learner, index.channels)
        peak = meters.peak(accelerator.device, accelerator.mixed_precision)
        self.meter = meters.Meter(recipe.batch.size, work, peak, accelerator.num_processes)
        self.pace = meters.Pace(recipe.steps, self.small, work, self.lines, begun)
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

    def _profiler(self, steps: int) -> Profiler | None:
        if not (self.recipe.profile and self.main):
            return None
        if steps < NEEDED:  # of a run that goes on: the same command must serve until its end
            self.say(f"profile=true: a trace takes {NEEDED} steps, and {steps} are left of this run: none is written")
            return None
        return Profiler(self.out / "profile")

    def _begin(self, prototypes: Tensor | None, fresh: bool) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / STOPPED).unlink(missing_ok=True)
        write_text(self.out / "recipe.yaml", to_yaml(self.recipe))
        # Digests of every image the run may read: evaluation refuses a test image that is among them.
        own = np.asarray(self.index.column("digest")[self.selected])
        save_file({"digest": branch.digests(self.recipe, own)}, self.out / branch.DIGESTS)
        if fresh and prototypes is not None:
            kept = {"initial": prototypes.float().cpu().numpy().copy()}
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
        """Is there a line to write? At checkpoints and probes too, so that a resumed run writes the same lines; and
        where crops grow or an objective starts, so that no line is of both sides of it."""
        often = (self.recipe.log.every, self.recipe.save.every, self.recipe.probe.every)
        return step in (self.recipe.steps, *self.turns) or any(every and step % every == 0 for every in often)

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
                self._quarantine(batch.bad, step)
        for name, value in {**{f"loss/{k}": v for k, v in losses.items()}, "loss": total, "grad_norm": norm}.items():
            taken = torch.where(refused > 0, 0.0, value.detach().float())
            self.sums[name] = self.sums[name] + taken if name in self.sums else taken
        self.steps += 1
        self.meter.step(batches[0].global_.shape[-1])
        self.skipped = self.skipped + (refused > 0)
        if self.profiler and (told := self.profiler.step()):
            self.say(told)
        self.bar.update(self.task, completed=step)
        if line_due:
            line = self._line(step, schedule, health)
            self.write(step, line)
            self._show(step, line)
            self._alarm()
            self._clear()

    def _line(self, step: int, schedule: Mapping[str, float], health: Mapping[str, Tensor]) -> dict[str, float]:
        taken = self.steps - self.skipped  # without any, the means are NaN: no loss is not a loss of zero
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
            **self.meter.read(),
            **({"global_size": self.meter.side} if self.small else {}),  # pixels
            "eta": round(self.pace.left(step, self.seconds), 1),  # seconds
        }

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One object to metrics.jsonl, and to the trackers."""
        if self.main:
            line = {"step": step, **values}
            self._keep(self.metrics, line)
            health = {k: v for k, v in line.items() if k == "step" or k.startswith("health/")}
            self.lines = thinned([*self.lines, health])
        if self.recipe.log.trackers:
            self.accelerator.log(dict(values), step=step)

    def _keep(self, journal: Journal, line: Mapping[str, Any]) -> None:
        if self.main and (wrong := journal.add(line)):
            self.say(f"warning: {wrong}; the run goes on, and tries again with the next line")

    def _quarantine(self, bad: list[dict[str, str]], step: int) -> None:
        try:
            self.quarantine.add(bad, seen=step * self.recipe.batch.size)
        except OSError as error:
            self.say(f"warning: {self.quarantine.path} could not be written ({error}); the run goes on")

    def _alarm(self) -> None:
        """Say what has begun to go wrong, once until it has passed."""
        now = alarms(self.lines) if self.main else []
        for alarm in now:
            if alarm.kind not in self.alarmed:
                self.say(f"alarm: {alarm}")
        self.alarmed = {alarm.kind for alarm in now}

    def _show(self, step: int, line: Mapping[str, float]) -> None:
        losses = "  ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in line.items() if k.startswith("loss/"))
        news = f"{meters.text(line)}  {losses}"
        self.bar.update(self.task, news=news)
        if self.main and self.bar.disable:
            print(f"step {step}/{self.recipe.steps}  {news}  {line['eta'] / 60:.1f} min left", flush=True)

    def say(self, text: str) -> None:
        if self.main:
            self.bar.console.print(text, highlight=False, soft_wrap=True)

    def back(self, step: int, why: str) -> None:
        """The run goes on from `step` again."""
        if self.main:
            self.lines = self.metrics.cut(step)
        self.bar.update(self.task, completed=step)
        self._clear()
        self.say(why)

    def skipped_steps(self, refused: Sequence[Mapping[str, Any]]) -> None:
        """Name the samples of steps that were not taken, in skipped.jsonl."""
        for one in refused:
            self._keep(self.refusals, one)
        if refused:
            last = refused[-1]
            self.say(
                f"skipped {len(refused)} step(s), the last {last['step']}: {last['reason']} (gradient norm "
                f"{last['grad_norm']}, loss {last['loss']}); their samples are in {self.refusals.path}"
            )

    def finish(self, step: int, reason: int, unsaved: str | None) -> int:
        """Last words, the report, and the exit code. unsaved: why the last checkpoint is not there."""
        self.accelerator.wait_for_everyone()  # gloo aborts now and then when a rank leaves early
        self.accelerator.end_training()
        if unsaved:
            print(f"error: {unsaved}; make room and give the same command: it goes on from the one before")
            return 1
        if step < self.recipe.steps and reason != ENOUGH:
            if self.main:
                write_text(self.out / STOPPED, f"step {step}\n")
            self.say(f"stopped at step {step} of {self.recipe.steps}, checkpoint written; the same command goes on")
            return RESUME_LATER
        if self.main:
            from pretrain import report  # scikit-learn, which training itself does not need

            page = report.write(self.out, self.recipe.data)
            early = f", ended early: {self.recipe.probe.early_stop} probes without a better one" if reason else ""
            print(f"done: {step} steps, {step * self.recipe.batch.size:,} images{early}\nreport: {page}")
            best = self.out / "checkpoints" / "best"
            chosen = best.with_name(best.read_text(encoding="utf-8")) if reason and best.is_file() else self.out
            print(f"next: python -m hybridssl export {chosen} --out models/{self.out.name}")
        return 0


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted keys with scalar values, as trackers want their configuration."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{path}{key}.")
        else:
            flat[path + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
