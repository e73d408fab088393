"""The checkpoints of a run: when one is due, what it holds, and what to say when the disk refuses it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from hybridssl.checkpoint import Keep, Writer, assist
from hybridssl.recipe import to_dict
from hybridssl.run import RunState
from hybridssl.student import Student
from pretrain.guard import Guard
from pretrain.recipe import Recipe
from shards.address import public
from shards.index import Index

AGAIN = 5.0  # seconds before the last checkpoint of a run is tried once more


class Keeper:
    """Writes the run's checkpoints (the main process does); the run goes on meanwhile."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        index: Index,
        samples: int,
        step: int,
        before: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """samples: how many the run reads an epoch; step: at which it goes on; before: the runs that it is a branch of
        (branch.py)."""
        self.recipe, self.accelerator, self.index, self.samples = recipe, accelerator, index, samples
        self.before = list(before)
        keep = Keep(recipe.save.keep, recipe.save.keep_every)
        self.writer = Writer(Path(recipe.out), keep, step) if accelerator.is_main_process else None

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.writer:
            self.writer.wait()  # a run that fails, or is told to end, leaves what it had begun to write whole

    def due(self, step: int, guard: Guard) -> bool:
        """Not while steps are being refused: what the run may return to should lie before them."""
        every = self.recipe.save.every
        regular = every > 0 and step % every == 0 and not guard.refused_in_a_row
        return regular or step == self.recipe.steps

    def save(
        self,
        step: int,
        position: int,
        learner: Student,
        teacher: Student,
        optimizer: torch.optim.Optimizer,
        guard: Guard,
        best: bool = False,
    ) -> None:
        """position: in the stream, of the next image that no process has seen. All processes call it."""
        if self.writer:
            self.writer.save(self._state(step, position, guard), learner, teacher, optimizer, best)
        else:
            assist(learner, teacher, optimizer)

    def wait(self) -> None:
        """Until the checkpoint in hand is on the disk, for all processes."""
        if self.writer:
            self.writer.wait()
        self.accelerator.wait_for_everyone()

    def complaint(self) -> str | None:
        """What the run should say about a checkpoint that failed; told once."""
        failed = self.writer.failed() if self.writer else None
        return f"warning: {failed}; the run goes on, and tries again at the next one" if failed else None

    def last(self) -> str | None:
        """Wait for the last checkpoint; where it failed, try once more. Returns what is wrong, if it failed again."""
        self.wait()
        if self.writer and self.writer.unwritten:  # whether or not a log point has told why
            time.sleep(AGAIN)
            self.writer.failed()  # of the first try
            self.writer.again()
            self.writer.wait()
            return self.writer.failed()
        return None

    def _state(self, step: int, position: int, guard: Guard) -> RunState:
        recipe, index, sets = self.recipe, self.index, [public(name) for name in self.recipe.data.sets]
        backbone = {
            "options": to_dict(recipe.backbone),
            "channels": index.channels,
            "image_size": recipe.views.global_size,
            "mean": list(recipe.views.mean),
            "std": list(recipe.views.std),
        }
        data = {
            "index": sets[0] if len(sets) == 1 else sets,
            "index_sha256": index.sha256,
            "splits": list(recipe.data.splits),
            "samples": self.samples,
            "position": position,
            "sources": list(index.sources),
            "classes": list(index.classes),
            "synthetic": index.synthetic,
            "before": self.before,
        }
        images = step * recipe.batch.size
        return RunState(step, images, to_dict(recipe), backbone, data, _machine(self.accelerator), guard.state())


def _machine(accelerator: Accelerator) -> str:
    """ "2 CPU cores" or "NVIDIA H100 x 4"."""
    if accelerator.device.type == "cuda":
        return f"{torch.cuda.get_device_name(accelerator.device)} x {accelerator.num_processes}"
    return f"{torch.get_num_threads() * accelerator.num_processes} CPU cores"
