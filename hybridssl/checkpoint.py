"""Writing checkpoints: safetensors + JSON, written beside, synced, renamed; in a thread, so that the run goes on.

    RUN/checkpoints/step-N/{model,optim}.safetensors, state.json     there whole or not at all
    RUN/checkpoints/latest, best                                     the name of one of them

`hybridssl/run.py` reads them again.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from hybridssl import optim, sharding
from hybridssl.files import sha256, sync, write_text
from hybridssl.run import FORMAT, VERSION, RunState, step_of


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest `last`, those whose step `every` divides (0: none), and the best one."""

    last: int = 2
    every: int = 0


def save(
    run: Path,
    state: RunState,
    student: nn.Module,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: Keep = Keep(),
    best: bool = False,
) -> Path:
    """Write checkpoints/step-N, point `latest` (and `best`) at it, remove what need not stay. Raises OSError."""
    return _write(run, state, *_tensors(student, teacher, optimizer), keep, best)


class Writer:
    """Writes in a thread of its own from copies in host memory; what fails is told, and the run goes on.

    One checkpoint at a time: `save` waits for the one before.
    """

    def __init__(self, run: Path, keep: Keep, step: int = 0) -> None:
        """step: of the checkpoint that the run goes on from; what lies beyond it was damaged."""
        self.run, self.keep = run, keep
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._job: tuple[RunState, dict[str, Tensor], dict[str, Tensor], bool] | None = None  # what is not written yet
        for left in (run / "checkpoints").glob("*.partial"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        newest = run / "checkpoints" / f"step-{step}"
        if _is_best(newest):  # killed before it said so beside it
            write_text(newest.with_name("best"), newest.name)
        _prune(run / "checkpoints", keep, step)

    def save(
        self,
        state: RunState,
        student: nn.Module,
        teacher: nn.Module,
        optimizer: torch.optim.Optimizer,
        best: bool = False,
    ) -> None:
        """Begin to write; returns as soon as the tensors are copied, so that the next step may change them.

        Of a sharded model all other processes call `assist` at the same time.
        """
        self.wait()
        self._job = None  # if it failed: make room
        model, moments = (
            {k: sharding.whole(v).to("cpu", copy=True) for k, v in t.items()}
            for t in _tensors(student, teacher, optimizer)
        )
        self._job = state, model, moments, best
        self.again()

    def again(self) -> None:
        """Begin to write once more what could not be written."""
        if self._job:
            self._thread = threading.Thread(target=self._try, args=self._job, name="checkpoint")
            self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread:
            self._thread.join()
            self._thread = None

    @property
    def unwritten(self) -> bool:
        """Whether the newest checkpoint is not on the disk: it is being written, or that failed."""
        return self._job is not None

    def failed(self) -> str | None:
        """What kept the last checkpoint from being written; told once."""
        told, self._failure = self._failure, None
        return told

    def _try(self, state: RunState, model: dict[str, Tensor], moments: dict[str, Tensor], best: bool) -> None:
        try:
            _write(self.run, state, model, moments, self.keep, best)
            self._job = None
        except (OSError, SafetensorError) as error:  # a full disk is no reason to lose the run
            self._failure = f"the checkpoint of step {state.step} could not be written ({error})"
            shutil.rmtree(_partial(self.run, state.step), ignore_errors=True)  # it is what fills the disk


def assist(student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Hand in this process's parts of a sharded model, one tensor after the other, to the process that saves it."""
    for tensors in _tensors(student, teacher, optimizer):
        for tensor in tensors.values():
            sharding.whole(tensor)


def _tensors(
    student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = {f"student.{k}": v.detach() for k, v in student.state_dict().items()}
    model |= {f"teacher.{k}": v.detach() for k, v in teacher.state_dict().items()}
    return model, dict(optim.named_state(optimizer, student))


def _write(
    run: Path, state: RunState, model: dict[str, Tensor], moments: dict[str, Tensor], keep: Keep, best: bool
) -> Path:
    folder = run / "checkpoints"
    final, partial = folder / f"step-{state.step}", _partial(run, state.step)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, tensors in (("model", model), ("optim", moments)):
        path = partial / f"{name}.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, path)
        sync(path)
    document = {"format": FORMAT, "version": VERSION, **vars(state), "best": best}
    document["sha256"] = {p.name: sha256(p) for p in sorted(partial.glob("*.safetensors"))}
    document["versions"] = {name: version(name) for name in ("torch", "timm")}
    write_text(partial / "state.json", json.dumps(document, indent=1))
    sync(partial)
    if final.exists():  # damaged, or of a run that went back to an older step
        shutil.rmtree(final)
    os.rename(partial, final)
    write_text(folder / "latest", final.name)
    if best:
        write_text(folder / "best", final.name)
    sync(folder)
    _prune(folder, keep, state.step)
    return final


def _is_best(folder: Path) -> bool:
    """Whether its probe was the best until then."""
    path = folder / "state.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("best", False)


def _partial(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step}.partial"


def _prune(folder: Path, keep: Keep, step: int) -> None:
    """What lies beyond `step` is not whole, or the run would be there: it is written anew, and counts as none until."""
    best = (folder / "best").read_text(encoding="utf-8") if (folder / "best").is_file() else ""
    there = [one for one in folder.glob("step-*[0-9]") if step_of(one) <= step]
    for old in sorted(there, key=step_of)[: -max(keep.last, 1)]:
        if old.name != best and not (keep.every and step_of(old) % keep.every == 0):
            shutil.rmtree(old)
