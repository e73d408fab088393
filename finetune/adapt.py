"""Train the backbone itself on the labels, in one of four ways, and save it as a backbone.

Is it worth more than the frozen features with a probe on top, and how much of it has to move? The modes:

  full     everything moves, with a learning rate that falls block by block from the last down (BEiT, 2106.08254)
  lora     only low-rank updates of the linear layers move; merged at the end (as in 2508.04441)
  lpft     full, but the head begins as the best logistic probe: linear probe, then fine-tune (2202.10054; 2305.08017)
  partial  the first blocks stay as they are, the last can go, a small DeiT can read what remains (2310.19522)

Val decides when to stop and which learning rate of --lr counts. Rare classes count as much as common ones. The
classifier of the seed that did best on val is kept: OUT/adapt-MODE/model is a backbone for --backbone of every verb,
with the head in its head.safetensors. In a chest X-ray left is not right and up is not down: give it --flips none.

  python -m finetune adapt --mode lora --backbone models/derm-s --data data/derm --out results/derm-s
  python -m finetune adapt --mode lpft --lr 1e-4 3e-4 --backbone models/derm-s --data data/derm --out results/derm-s
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from finetune import adapted, adapters, options, probe, task
from finetune.adapters import Change, Classifier
from finetune.task import Task
from finetune.training import FLIPS, Recipe, Trained, all_flips, predict, train
from hybridssl import lora
from hybridssl.errors import UserError
from shards.terminal import Terminal

# The learning rates and the recipe of each mode. lora: 2508.04441 (Adam, without weight decay, one rising and falling
# cycle); partial: weight decay and batch of 2310.19522; full and lpft: common practice for ViTs (2106.08254).
MODES: dict[str, tuple[tuple[float, ...], Recipe]] = {
    "full": ((1e-4, 5e-4), Recipe(32, 30, 10, 0.05, 0.75, 0.1)),
    "lora": ((1e-4, 1e-3), Recipe(16, 100, 20, 0.0, 1.0, 0.3)),
    "lpft": ((1e-5, 1e-4), Recipe(32, 30, 10, 0.05, 0.75, 0.1)),
    "partial": ((1e-4, 5e-4), Recipe(64, 30, 10, 1e-5, 1.0, 0.1)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    parser.add_argument("--mode", required=True, choices=MODES, help="what moves")
    add_training_arguments(parser)
    add = parser.add_argument_group("mode partial").add_argument
    blocks = lambda word: adapters.ALL if word == "all" else int(word)  # noqa: E731
    add("--freeze-blocks", type=blocks, metavar="N", help="the first N blocks rest, or all (half of them)")
    add("--drop-blocks", type=int, default=0, metavar="N", help="the last N blocks go (0)")
    add("--head", choices=("linear", "deit"), default="linear", help="deit: a small transformer on the patches")
    add("--head-blocks", type=int, default=12, metavar="N", help="depth of that transformer (12: DeiT-Ti)")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every training shares."""
    add = parser.add_argument_group("training (a default in brackets; else it depends on the mode)").add_argument
    add("--lr", type=float, nargs="+", metavar="LR", help="learning rates, of which val chooses")
    add("--epochs", type=int, metavar="N", help="at most")
    add("--patience", type=int, metavar="N", help="epochs without a better val before it stops")
    add("--train-batch", type=int, metavar="N", help="images a step")
    add("--steps", type=int, default=20, metavar="N", help="an epoch has at least so many, however few labels (20)")
    add("--layer-decay", type=float, metavar="F", help="learning rate x this per block, from the last down")
    add("--mixup", type=float, default=0.2, metavar="A", help="alpha of the Beta distribution (0.2); 0: none")
    add("--crop", type=float, default=0.5, metavar="F", help="smallest share of the image in a random crop (0.5)")
    add("--flips", choices=FLIPS, default="both", help="which flips change nothing in your images (both)")
    add("--tta", action="store_true", help="test-time augmentation: the mean over all such flips of an image")


@dataclass(frozen=True)
class Plan:
    """All that is decided before the data is seen."""

    change: Change
    lrs: tuple[float, ...]
    recipe: Recipe
    tta: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {"lr": list(self.lrs), "tta": self.tta, **asdict(self.change), **asdict(self.recipe)}


def plan_of(args: argparse.Namespace, change: Change) -> Plan:
    """The mode's defaults with what was asked for. UserError for a number that cannot be."""
    lrs, recipe = MODES[change.mode]
    asked = {"batch": args.train_batch, "epochs": args.epochs, "patience": args.patience}
    asked |= {"layer_decay": args.layer_decay, "steps": args.steps, "mixup": args.mixup}
    asked |= {"crop": args.crop, "flips": args.flips}
    plan = Plan(
        change,
        tuple(args.lr or lrs),
        replace(recipe, **{name: value for name, value in asked.items() if value is not None}),
        args.tta,
    )
    r = plan.recipe
    for option, value, good in (
        ("--lr", min(plan.lrs), min(plan.lrs) > 0),
        ("--epochs", r.epochs, r.epochs >= 1),
        ("--patience", r.patience, r.patience >= 1),
        ("--train-batch", r.batch, r.batch >= 1),
        ("--steps", r.steps, r.steps >= 1),
        ("--layer-decay", r.layer_decay, 0 < r.layer_decay <= 1),
        ("--mixup", r.mixup, r.mixup >= 0),
        ("--crop", r.crop, 0 < r.crop <= 1),
        ("--head-blocks", change.head_blocks, change.head_blocks >= 1),
        ("--drop-blocks", change.drop_blocks, change.drop_blocks >= 0),
    ):
        if not good:
            raise UserError(f"{option} {value} cannot be: see `python -m finetune adapt --help`")
    return plan


def run(args: argparse.Namespace) -> None:
    partial = (args.freeze_blocks, args.drop_blocks, args.head, args.head_blocks)
    if args.mode != "partial" and partial != (None, 0, "linear", 12):
        raise UserError("--freeze-blocks, --drop-blocks, --head and --head-blocks belong to --mode partial")
    protocol = f"adapt-{args.mode}"
    plan = plan_of(args, Change(args.mode, *partial) if args.mode == "partial" else Change(args.mode))
    work = task.prepare(args, [protocol])
    adapters.require_trainable(work.encoder)
    fits = [fit(work, *work.split(seed), plan, seed) for seed in args.seeds]
    best = int(np.argmax([found.val for found in fits]))
    scores = [found.predict(work.test) for found in fits]
    val = [found.predict(work.split(seed)[1]) for found, seed in zip(fits, args.seeds, strict=True)]
    about = {"protocol": protocol, "seed": args.seeds[best], "choice": fits[best].choice, "plan": plan.as_dict()}
    folder = args.out / protocol / "model"
    detail = {
        "parameters": fits[0].classifier.counts(),
        "tried": [{"seed": seed, "runs": found.tried} for found, seed in zip(fits, args.seeds, strict=True)],
        "model": {"folder": "model", "seed": args.seeds[best]},
    }
    grid = {**plan.as_dict(), "class_weight": probe.weighing(work.kind)}  # by the prior in training.loss_of
    work.finish(protocol, scores, [found.choice for found in fits], grid, val, detail=detail)
    lora.merge(fits[best].classifier.model)
    adapted.save(folder, fits[best].classifier, work, work.split(args.seeds[best])[0], about)
    Terminal().print(f"the adapted backbone: {folder}", soft_wrap=True)


@dataclass(frozen=True)
class Fitted:
    """A trained classifier, at the learning rate and the epoch that did best on val."""

    classifier: Classifier
    work: Task
    val: float
    choice: dict[str, Any]
    tried: list[dict[str, Any]]  # per learning rate: lr, val, epoch, history
    flips: list[tuple[int, ...]]

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Probabilities float64 [M, K] of these rows of the task."""
        return predict(self.classifier, self.work, rows, self.flips)


def fit(work: Task, train_rows: np.ndarray, val_rows: np.ndarray, plan: Plan, seed: int) -> Fitted:
    """Train once for every learning rate; the one that does best on val (the first of equals) is what comes back."""
    change, present = plan.change, work.counts(train_rows) > 0
    start = None
    if change.mode == "lpft":
        count = len(work.classes)
        start = probe.fit(work.features.x, work.y, train_rows, val_rows, work.kind, count, seed, "logistic")
    tried: list[tuple[float, Trained]] = []

    def build() -> Classifier:
        torch.manual_seed(seed)
        return adapters.build(work.encoder, change, present, start)

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        torch.random.fork_rng(),
        Progress(*columns, TimeRemainingColumn(), console=Terminal(stderr=True)) as progress,
    ):
        for lr in plan.lrs:
            name = f"{change.mode}, lr {lr:g}, seed {seed}"
            bar = progress.add_task(name, total=plan.recipe.epochs)

            def tick(epoch: int, val: float, bar: Any = bar, name: str = name) -> None:
                progress.update(bar, completed=epoch, description=f"{name}: best val {val:.3f}")

            tried.append((lr, train(build(), work, (train_rows, val_rows), plan.recipe, lr, seed, tick)))
        lr, best = max(tried, key=lambda pair: pair[1].val)
        classifier = build()
        classifier.load_state_dict(best.state, strict=False)
    choice = {"lr": lr, "epoch": best.epoch, **({"probe": start.choice} if start else {}), "val": round(best.val, 4)}
    entries = [{"lr": lr, "val": t.val, "epoch": t.epoch, "history": t.history} for lr, t in tried]
    return Fitted(classifier, work, best.val, choice, entries, all_flips(plan.recipe.flips) if plan.tta else [()])
