"""python -m hybridssl doctor --data DIR: look at the data and at the machine, and propose a recipe, a reason a line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridssl.errors import UserError
from shards.address import public, told
from shards.errors import DataError

if TYPE_CHECKING:  # help that loads torch first takes ten seconds
    from pretrain.fingerprint import Data, Machine
    from pretrain.proposal import Proposal
    from shards.index import Index

ABOUT = """\
Look at the training images (number, size, colour, labels, sources) and at this machine (cores, memory, GPUs), and
propose a recipe: backbone, start, crops, batch, prototypes, teacher, length, each with its reason. It is what

  accelerate launch pretrain data.train=DIR out=RUN

takes by itself (recipe=auto). Nothing is downloaded. One step is timed for the duration, with fresh weights.
"""
EXAMPLES = """\
examples
  python -m hybridssl doctor --data data/derm
  python -m hybridssl doctor --data data/derm --out derm.yaml
  python -m hybridssl doctor --data data/derm batch.size=64 backbone.weights=models/mine    what you fix, it fits to
"""


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        run(args.data, args.keys, args.out)
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m hybridssl doctor", description=ABOUT, epilog=EXAMPLES)
    parser.formatter_class = plain
    parser.add_argument("--data", required=True, metavar="DIR", help="a folder made by `python -m shards build`")
    parser.add_argument("--out", metavar="FILE", help="write the recipe there, such as derm.yaml; its folder is made")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="recipe keys that are decided already")
    return parser


def run(folder: str, keys: Sequence[str], out: str | None) -> None:
    """Look, propose, time a step, print, and write the recipe if `out` names a file."""
    import torch

    from hybridssl.recipe import parse_overrides, resolve
    from pretrain.measure import measure
    from pretrain.recipe import Recipe

    if out:
        _make_room(Path(out))
    fixed = parse_overrides([*keys, f"data.train={folder}"])
    index = resolve(Recipe, [fixed]).data.open()
    proposal = look(index, fixed)
    recipe = resolve(Recipe, [{"name": Path(out).stem if out else "auto"}, proposal.tree(), fixed])
    try:
        machine = proposal.draft.machine
        measured = measure(recipe, index, machine.processes, machine.cores)
        how = f"measured: {measured.images_per_second:,.0f} images/s in a pass of {measured.images}"
        how += f", {measured.peak:.1f} GiB" if measured.peak else ""
        duration = _duration(recipe.steps * recipe.batch.size / measured.images_per_second)
    except torch.cuda.OutOfMemoryError:
        speed = proposal.draft.images_per_second or float("inf")
        how = f"by arithmetic; a pass of {recipe.batch.micro} images did not fit when tried: halve batch.micro"
        duration = _duration(recipe.steps * recipe.batch.size / speed)
    proposal.say("duration", how, duration)
    show(proposal, index)
    if out:
        Path(out).write_text(_file(proposal, fixed, out, f"{duration} ({how})"), encoding="utf-8")
        print(f"wrote {out}")
    # Without a file the keys are all that makes it this recipe, and not another one.
    words = [f"recipe={out}"] if out else [f"data.train={public(folder)}", *map(told, keys)]
    print(f"next: accelerate launch pretrain {shlex.join(words)} out=runs/NAME")


def _make_room(path: Path) -> None:
    """The folder for the recipe. UserError where it could not be written, or not be found again, after the work."""
    if path.exists():
        raise UserError(f"{path} is there already: name another file, or delete it")
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {path}: recipe= finds a file by its .yaml; say --out {path}.yaml")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: its folder cannot be made ({error}); name another one") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--out {path}: {path.parent.absolute()} may not be written to; name another folder")


def look(index: Index, fixed: Mapping[str, Any]) -> Proposal:
    """The proposal for an index on this machine. UserError for a wrong key, or nothing to train on."""
    from hybridssl.recipe import resolve
    from pretrain import fingerprint
    from pretrain.draft import RELEASED
    from pretrain.propose import propose
    from pretrain.recipe import Recipe

    wishes = resolve(Recipe, [fixed])  # so that a mistake is named before anything rests on it
    return propose(fingerprint.data(index, wishes.data.splits), fingerprint.machine(RELEASED), fixed)


def automatic(fixed: Mapping[str, Any]) -> dict[str, Any]:
    """`recipe=auto`: what the run folder holds if a run has begun there; else a proposal, printed by the first process.

    A run that goes on is not proposed anew: on another machine that would be another run. Nothing without `out`, or
    without data for a new run: what is missing, or no text, is named where the recipe is checked.
    """
    from hybridssl import run
    from hybridssl.recipe import resolve
    from pretrain.draft import given
    from pretrain.recipe import Recipe

    folder, out = given(fixed, "data.train", ""), given(fixed, "out", "")
    if not (out and isinstance(out, str)):
        return {}
    if any(Path(out).glob("checkpoints/step-*[0-9]/state.json")):
        return _parted_anew(run.read_state(out)["recipe"], fixed)
    if not folder:
        return {}
    index = resolve(Recipe, [fixed]).data.open()
    proposal = look(index, fixed)
    if os.environ.get("RANK", "0") == "0":
        show(proposal, index)
    return proposal.tree()


def _parted_anew(held: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe that a run holds, its micro-batch parted for as many processes as there are now: preempted on one GPU
    it may go on on two. No larger than it was: that much is known to fit."""
    from hybridssl.recipe import resolve
    from pretrain.data import fitting
    from pretrain.recipe import Recipe

    recipe = resolve(Recipe, [held, fixed])
    if not recipe.batch.micro or recipe.batch.micro == "auto":  # 0: all at once, as many as these are
        return dict(held)
    micro = fitting(recipe, int(os.environ.get("WORLD_SIZE", 1))) or recipe.batch.micro  # no part: the loop says why
    return {**held, "batch": {**held["batch"], "micro": micro}}


def show(proposal: Proposal, index: Index) -> None:
    """Three tables: what was found, on which machine, what follows."""
    from rich.table import Table
    from rich.text import Text

    from shards.terminal import Terminal

    console = Terminal(highlight=False)
    data, machine = proposal.draft.data, proposal.draft.machine
    names = " + ".join(str(member).rpartition("/")[2] for member in index.members)
    about = ((f"training images of {names}", _of_data(data)), ("this machine", _of(machine)))
    for title, rows in about:
        table = Table(title=title, show_header=False)
        for name, text in rows.items():
            table.add_row(name, Text(text))
        console.print(table)
    table = Table("", "proposal", "why", title="recipe")
    for choice in proposal.choices:
        table.add_row(choice.what, Text(str(choice)), Text(choice.reason))
    console.print(table)
    for note in proposal.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _of_data(data: Data) -> dict[str, str]:
    classes = sorted(data.per_class.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {count:,}" for name, count in classes[:8]) + (", ..." if len(classes) > 8 else "")
    sources = ", ".join(f"{name} {count:,}" for name, count in list(data.sources.items())[:8])
    return {
        "images": f"{data.images:,}",
        "short side": f"{data.short_side} px (median of {data.looked_at:,} looked at)",
        "channels": f"{data.channels}, {'grey' if data.grey else 'colour'}, {data.bits} bits",
        "labelled": f"{data.labelled:,} ({data.labelled / data.images:.0%})" + (f": {shown}" if shown else ""),
        "several labels": f"{data.several:.1%} of the labelled",
        "sources": sources or "none named",
        "groups": f"{data.groups:,}" if data.groups else "none named",
        "reports, masks": f"{data.texts:,}, {data.masks:,}",
    }


def _of(machine: Machine) -> dict[str, str]:
    gpu = f"{machine.gpus} x {machine.gpu}, {machine.gpu_memory:.0f} GiB" if machine.gpus else "none"
    return {
        "CPU": f"{machine.cores} cores, {machine.memory:.0f} GiB",
        "GPU": gpu,
        "bf16": "yes" if machine.bf16 else "no",
        "released weights": ", ".join(sorted(machine.had)) or "none on this machine",
    }


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    return (
        f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.0f} minutes"
    )


def _file(proposal: Proposal, fixed: Mapping[str, Any], path: str, duration: str) -> str:
    data, machine = proposal.draft.data, proposal.draft.machine
    where = f"{machine.gpus} x {machine.gpu}" if machine.gpus else f"{machine.cores} CPU cores"
    head = {
        "data": f"{data.images:,} images, short side {data.short_side} px, {data.labelled:,} labelled",
        "hardware": where,
        "duration": duration,
        "result": "not measured yet",
        "command": f"accelerate launch pretrain recipe={path} out=runs/{Path(path).stem}",
    }
    train = fixed["data"]["train"]
    sets = ",".join(public(str(name)) for name in (train if isinstance(train, list) else [train]))
    title = f"# Proposed by `python -m hybridssl doctor` for {sets}.\n#\n"
    lines = "".join(f"# {name:<9} {text}\n" for name, text in head.items())
    return title + lines + proposal.yaml()


if __name__ == "__main__":
    sys.exit(main())
