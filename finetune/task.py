"""What every frozen-feature protocol shares: options, data, splits, leak guard, and the writing of its result.

task = prepare(args, ["knn"])
for seed in args.seeds:
    train, val, test = task.split(seed)
    ... choose on val, then scores [N, K] of task.test ...
task.finish("knn", scores of every seed, choices, grid, scores of val of every seed)
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from finetune import metrics, results
from finetune.backbones import load
from finetune.encoder import Encoder
from finetune.features import Features, default_cache, extract
from finetune.kinds import Kind
from finetune.question import ask, labelled
from finetune.splits import Leaks, find_leaks, guard, label_subset
from hybridssl.errors import UserError
from shards.address import public
from shards.index import Index
from shards.terminal import Terminal

SPLITS = ("train", "val", "test")
CARVED = 0.2  # share of the train groups that chooses when there is no val split
FEW = 20  # test groups below which the percentile intervals are known to be too narrow


@dataclass
class Task:
    args: argparse.Namespace
    encoder: Encoder
    index: Index
    features: Features  # of all labelled samples of the splits below
    rows: dict[str, np.ndarray]  # split -> rows of `features`; val may be missing
    y: np.ndarray  # int64 [N]: class of each row, in `classes`; uint8 [N, K] with --multi-label
    classes: tuple[str, ...]  # the classes that occur; with --grades in their order
    kind: Kind
    leaks: Leaks
    prepared: float  # seconds that opening, loading and extracting took
    since: float  # when the protocol at work began

    @property
    def test(self) -> np.ndarray:
        return self.rows["test"]

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows to train on and to choose on, for one seed: `--labels` of the train split; val, or a part of train."""
        train, group = self.taught(seed), self.features.group
        if "val" in self.rows:
            return train, self.rows["val"]
        carved = label_subset(self._strata(train), group[train], CARVED, seed + 1_000_003, keep_one=True)
        if not carved.any():
            raise UserError("there is no val split, and train has too few groups to carve one: add a val split")
        return train[~carved], train[carved]

    def taught(self, seed: int) -> np.ndarray:
        """Rows to train on where nothing is chosen: `--labels` of the train split, and none of them carved off."""
        train = self.rows["train"]
        if self.args.labels == 1:
            return train
        return train[label_subset(self._strata(train), self.features.group[train], self.args.labels, seed)]

    def _strata(self, rows: np.ndarray) -> np.ndarray:
        """int64: the class by which a draw of labels is balanced; of several labels, the rarest in the data."""
        if not self.kind.multi_label:
            return self.y[rows]
        return np.where(self.y[rows] > 0, self.y.sum(0, dtype=np.int64), np.iinfo(np.int64).max).argmin(1)

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """int64 [K]: images of each class among the rows."""
        y = self.y[rows]
        return y.sum(0, dtype=np.int64) if self.kind.multi_label else np.bincount(y, minlength=len(self.classes))

    def finish(
        self,
        protocol: str,
        scores: list[np.ndarray],
        choices: list[dict[str, Any]],
        grid: dict[str, Any],
        val: list[np.ndarray],
        **more: Any,
    ) -> Path:
        """scores: per seed [N, K] of the test rows; choices: per seed, what was chosen; grid: among what; val: per seed
        the scores of the rows that chose, for a temperature or a threshold set later; more: into the file."""
        y, group = self.y[self.test], self.features.group[self.test]
        found = metrics.bootstrap(y, np.stack(scores), group, self.kind.metrics)
        about = self.about(protocol) | more
        about["selected"] = {
            "split": "val" if "val" in self.rows else f"val, carved out of train: {CARVED:.0%} by groups",
            "by": self.kind.select_by,
            "grid": grid,
            "choices": [{"seed": seed, **choice} for seed, choice in zip(self.args.seeds, choices, strict=True)],
        }
        used = [self.split(seed) for seed in self.args.seeds]
        labels = {"train": [len(train) for train, _ in used], "val": [len(val) for _, val in used]}
        about["cost"] = {
            "seconds": self.seconds(),
            "labels_used": labels,
            "peak_memory_mb": peak_mb(),
        }
        about["notes"] = [*self.notes([train for train, _ in used]), *rich_val(labels)]
        arrays = {"scores": np.stack(scores).astype(np.float32), **self._rows(self.test)}
        for at, ((_, rows), values) in enumerate(zip(used, val, strict=True)):
            own = {"scores": values.astype(np.float32), **self._rows(rows)}
            arrays |= {f"val_{name}_{at}": array for name, array in own.items()}
        path = results.write(self.args.out / protocol, about, found, **arrays)
        show(protocol, about, found, path)
        return path

    def _rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"y": self.y[rows], "group": self.features.group[rows], "number": self.features.numbers[rows]}

    def seconds(self) -> float:
        """What one protocol would have cost alone: the preparation and its own time."""
        now = time.monotonic()
        own, self.since = now - self.since, now
        return round(self.prepared + own, 2)

    def about(self, protocol: str) -> dict[str, Any]:
        encoder, column = self.encoder, self.index.column("group")
        return {
            "protocol": protocol,
            "task": self.kind.as_dict(),
            "backbone": encoder.about(),
            "data": {
                "index": public(str(self.args.data)),
                "sha256": self.index.sha256,
                "synthetic": self.index.synthetic,
                "source": self.args.source,
                "column": _column(self.args),
                "labels": self.args.labels,
                "splits": {name: len(rows) for name, rows in self.rows.items()},
                "groups": {name: len(np.unique(self.features.group[rows])) for name, rows in self.rows.items()},
                "group_column": "group" if (column[self.features.numbers] != 0).any() else None,
                "classes": {
                    name: {split: int(self.counts(rows)[k]) for split, rows in self.rows.items()}
                    for k, name in enumerate(self.classes)
                },
                "bad": self.features.bad,
            },
            "seeds": self.args.seeds,
            "leaks": self.leaks.as_dict(),
        }

    def notes(self, trained: list[np.ndarray]) -> list[str]:
        """What a reader of the figures must know, in plain sentences."""
        said = []
        taught = np.min([self.counts(train) for train in trained], axis=0)
        asked = self.counts(self.test)
        untaught = [c for c, count, judged in zip(self.classes, taught, asked, strict=True) if judged and not count]
        unasked = [c for c, count in zip(self.classes, asked, strict=True) if not count]
        if untaught:
            said.append(f"no training label for {', '.join(untaught)}: its test images count as wrong")
        if unasked:
            said.append(f"no test image of {', '.join(unasked)}: the means are over the other classes")
        if (self.index.column("group")[self.features.numbers] == 0).all():
            said.append("the index has no groups: intervals resample images, too narrow if patients have several")
        units = len(np.unique(self.features.group[self.test]))
        if units == 1:
            said.append("test is of one patient or lesion: there is no interval, and nothing to compare by")
        elif units < FEW:
            what = "images" if units == len(self.test) else "patients or lesions"
            said.append(f"test has only {units:,} {what}: with fewer than {FEW}, the 95 % intervals are too narrow")
        if self.features.bad:
            said.append(f"{len(self.features.bad):,} images did not decode and are left out")
        if self.leaks.pretraining is None and not self.encoder.baseline:
            said.append("the backbone does not record what it was pretrained on: a leak cannot be ruled out")
        if self.index.synthetic:
            said.append("synthetic images: these figures say nothing about patients")
        return said


def rich_val(used: Mapping[str, Sequence[int]]) -> list[str]:
    """A note where val, which chooses, has more labels than train was given. used: labels of each seed by split."""
    if min(used["train"], default=0) >= max(used["val"], default=0):
        return []
    return [
        f"val keeps its {max(used['val']):,} labels, even where {min(used['train']):,} train: choices are better "
        "informed there than a clinic with so few labels could make them"
    ]


def prepare(args: argparse.Namespace, protocols: list[str], reads: tuple[str, ...] = SPLITS) -> Task:
    """Open, check, guard, then extract the features of the labelled samples of the splits `reads`.

    The classes are those of all labelled samples. UserError or DataError before any work.
    """
    if not 0 < args.labels <= 1:
        raise UserError(f"--labels {args.labels} must be above 0 and at most 1 (a share of the train labels)")
    if (column := _column(args)) and args.multi_label:
        raise UserError(f"--column {column} has one value per image: leave --multi-label out")
    started = time.monotonic()
    index = Index.open(args.data)
    label, classes = labelled(index, column)
    numbers = _by_split(index, label, args.source, reads)
    encoder = load(args.backbone, seed=args.seeds[0], device=device_of(args.device), size=args.size)
    leaks = guard(find_leaks(index, numbers, encoder.digests), args.allow_leak)
    data = {"sha256": index.sha256, "labels": args.labels, "source": args.source, "column": column}
    for protocol in protocols:
        about = {"protocol": protocol, "backbone": encoder.about(), "data": data}
        results.check_room(args.out / protocol, about, args.overwrite)
    named = np.unique(np.concatenate([label[own] for own in numbers.values()]))
    numbers = {name: own for name, own in numbers.items() if name in reads}
    wanted = np.concatenate(list(numbers.values()))
    features = extract(encoder, index, wanted, args.batch, args.workers, args.cache or default_cache())
    if column:
        features = replace(features, y=np.eye(len(classes), dtype=np.uint8)[label[features.numbers]], classes=classes)
    for entry in features.bad:
        Terminal(stderr=True).print(f"left out: {entry['key']} in {entry['shard']}: {entry['reason']}")
    rows = {name: np.flatnonzero(np.isin(features.numbers, own)) for name, own in numbers.items()}
    if empty := [name for name, own in rows.items() if not len(own)]:
        raise UserError(
            f"no labelled image of split {', '.join(empty)} of {index.root} could be decoded (first: "
            f"{features.bad[0]['key']}, {features.bad[0]['reason']}): build the index from whole images"
        )
    kind, classes, y = ask(args, features, named, protocols)
    now = time.monotonic()
    return Task(args, encoder, index, features, rows, y, classes, kind, leaks, now - started, now)


def _column(args: argparse.Namespace) -> str | None:
    return getattr(args, "column", None)


def _by_split(index: Index, label: np.ndarray, source: str | None, reads: tuple[str, ...]) -> dict[str, np.ndarray]:
    """split -> numbers of its labelled samples. UserError when one of `reads`, but val, has none."""
    where = index.column("source")
    if source is not None and source not in index.sources:
        raise UserError(f"{index.root} has no source '{source}'; it has {', '.join(index.sources) or 'none'}")
    found = {}
    for split in SPLITS:
        at = index.splits.index(split) if split in index.splits else -1
        chosen = (index.column("split") == at) & (label >= 0)
        if source is not None:
            chosen &= where == index.sources.index(source)
        if chosen.any():
            found[split] = np.flatnonzero(chosen).astype(np.int64)
        elif split in reads and split != "val":
            there = int((index.column("split") == at).sum())
            needed = " and ".join(name for name in reads if name != "val")
            raise UserError(
                f"{index.root} has no labelled image in split '{split}' ({there:,} without a label): evaluation needs "
                f"labelled {needed} images; build the index from a table with label and split columns"
            )
    if "train" in reads and len(np.unique(label[found["train"]])) < 2:
        raise UserError(f"the train labels of {index.root} are all of one class: there is nothing to tell apart")
    return found


def device_of(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except Exception as error:  # RuntimeError, AssertionError or AcceleratorError by version and device
        raise UserError(f"--device {name} cannot be used on this machine; try --device auto") from error
    return name


def suggest(args: argparse.Namespace, protocol: str) -> None:
    """What a score by itself does not say: is it more than that of a backbone that has learnt nothing?"""
    here, spec = args.out / protocol, args.backbone
    if spec == "histogram" or spec.startswith("random:"):
        then = f"python -m finetune compare {here} OTHER/{protocol} --out {args.out.parent}"
    else:
        null = args.out.with_name(f"{args.out.name}-random")
        then = f"the same with --backbone random:{spec} --out {null}, then "
        then += f"python -m finetune compare {null / protocol} {here} --out {args.out.parent}"
    Terminal().print(f"next: {then}", soft_wrap=True)


def peak_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return round(max(host, device) / 2**20, 1)


def show(protocol: str, about: dict[str, Any], found: dict[str, metrics.Interval], path: Path) -> None:
    """The result as a table on the terminal."""
    console, data = Terminal(), about["data"]
    taught = results.labels_alone(about) or f"{data['labels']:.0%} of the train labels"
    of = ", ".join(filter(None, [data["index"], results.part(data), taught]))
    title = f"{protocol}: {about['backbone']['name']} on {of}"
    console.print(title, style="bold", soft_wrap=True)
    table = Table("metric", "test", "95 % over groups")
    for name, m in found.items():
        table.add_row(name, f"{m.value:.3f}", "-" if np.isnan(m.low) else f"{m.low:.3f} to {m.high:.3f}")
    console.print(table)
    choices = about["selected"]["choices"]
    if any(choice.keys() > {"seed"} for choice in choices):
        chosen = "; ".join(", ".join(f"{k} {v}" for k, v in choice.items()) for choice in choices)
        console.print(f"chosen on {about['selected']['split']}: {chosen}")
    leaks = Leaks(**about["leaks"])
    for sentence in leaks.sentences():
        console.print(f"LEAK: {sentence}", style="bold red")
    for note in about["notes"]:
        console.print(f"note: {note}")
    console.print(f"written: {path}", soft_wrap=True)
