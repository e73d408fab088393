"""Segmentation on frozen patch features: do the patches know where things are?

Three heads, from the plainest to the strongest, learn masks while the backbone stays as it is: `linear` (batch norm and
one 1x1 convolution on the last patches), `knn` (every patch asks its nearest training patches; nothing is trained) and
`upernet` (pyramid pooling and a feature pyramid over four blocks). The index needs masks (a `mask` column of its table)
and no class labels. Images without a mask are left out and counted. `histogram` is a baseline of patch colours.

Masks are judged at the size of the image that the backbone sees (`--size`), by IoU and Dice: a mean over images, and
pooled over all pixels. Learning rate, step and k are chosen on val. Writes OUT/segment_HEAD/: results.json,
predictions.safetensors (overlap an image, and the masks as bits: finetune.masks.unpack) and report.html.

  python -m finetune segment --backbone models/derm-s --data data/masks --out results/derm-s
  python -m finetune segment --backbone histogram --data data/masks --out results/histogram      (null baseline)
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune import masks, metrics, options, results, segment_page, task
from finetune.features import Features, default_cache
from finetune.kinds import Kind
from finetune.masks import FOREGROUND
from finetune.patch_samples import Samples, collect
from finetune.patches import block_maps, load_encoder
from finetune.segmenters import (
    BACKGROUNDS,
    BANK,
    BATCH,
    EPOCHS,
    HEADS,
    KS,
    LRS,
    TEMPERATURE,
    Head,
    predict_masks,
    train_head,
)
from finetune.splits import find_leaks, guard
from finetune.task import Task
from hybridssl.errors import UserError
from shards.index import Index
from shards.terminal import Terminal

Array = np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    add = parser.add_argument
    add("--heads", nargs="+", choices=HEADS, metavar="HEAD", help="linear, knn, upernet (all that the backbone allows)")
    add("--mask-classes", nargs="+", metavar="NAME", help="names of the mask values 1, 2, ... (all but 0: foreground)")
    add("--lr", nargs="+", type=float, default=list(LRS), metavar="LR", help=f"rates of Adam to choose from {LRS}")
    add("--epochs", type=int, default=EPOCHS, metavar="N", help=f"passes over the training masks ({EPOCHS})")


@dataclass(frozen=True)
class Masked:
    """A task on masks: what every protocol shares, and the patches that heads learn from. Rows of both are the same."""

    task: Task
    samples: Samples
    heads: tuple[str, ...]
    notes: list[str]


def run(args: argparse.Namespace) -> None:
    work = prepare_masks(args)
    for name in work.heads:
        started, trained, bits, counts = time.monotonic(), [], [], []
        truth, classes = work.samples.masks[work.task.test], len(work.samples.classes)
        for seed in args.seeds:
            train, val = work.task.split(seed)
            trained.append(train_head(name, work.samples, train, val, seed, args.lr, args.epochs))
            found = predict_masks(trained[-1], work.samples, work.task.test)
            counts.append(masks.overlap(truth, found, classes))
            bits.append(masks.pack(found, classes))
        seconds = work.task.prepared + time.monotonic() - started
        finish(work, name, trained, np.stack(counts), np.stack(bits), seconds)


def prepare_masks(args: argparse.Namespace, name: str = "segment_{}") -> Masked:
    """Open, check, guard, then patches and masks of every sample that has a mask and a split.

    name: of the protocols, with {} for the head. UserError or DataError before any work.
    """
    _check(args)
    started, index = time.monotonic(), Index.open(args.data)
    numbers, without = masked_splits(index, args.source)
    device = task.device_of(args.device)
    encoder = load_encoder(args.backbone, args.seeds[0], device, args.size)
    heads, notes = tuple(args.heads or HEADS), []
    if "upernet" in heads and block_maps(encoder) is None:
        if args.heads:
            raise UserError(f"{encoder.name} shows no blocks, which upernet needs: choose --heads linear knn")
        heads = tuple(head for head in heads if head != "upernet")
        Terminal(stderr=True).print(f"{encoder.name} shows no blocks: upernet is left out")
    leaks = guard(find_leaks(index, numbers, encoder.digests), args.allow_leak)
    classes = tuple(args.mask_classes or FOREGROUND)
    data = {"sha256": index.sha256, "labels": args.labels, "source": args.source, "masks": classes}
    for head in heads:
        about = {"protocol": name.format(head), "backbone": encoder.about(), "data": data}
        results.check_room(args.out / name.format(head), about, args.overwrite)
    wanted, reads = np.concatenate(list(numbers.values())), list(dict.fromkeys(HEADS[head] for head in heads))
    cache = args.cache or default_cache()
    samples = collect(encoder, index, wanted, classes, reads, args.batch, args.workers, cache)
    for entry in samples.bad:
        Terminal(stderr=True).print(f"left out: {entry['key']} in {entry['shard']}: {entry['reason']}")
    rows = {split: np.flatnonzero(np.isin(samples.numbers, own)) for split, own in numbers.items()}
    empty = [split for split, own in rows.items() if not len(own)]
    if empty:
        raise UserError(f"no mask of split {', '.join(empty)} of {index.root} can be used: {samples.bad[0]['reason']}")
    if without:
        left = ", ".join(f"{count:,} of {split}" for split, count in without.items())
        notes.append(f"images without a mask are left out: {left}")
    y = np.zeros(len(samples.numbers), dtype=np.int64)
    source = np.asarray(index.column("source")[samples.numbers])
    known = np.zeros((len(y), 1), dtype=np.uint8)
    features = Features({}, known, samples.numbers, source, samples.group, ("mask",), index, samples.bad)
    kind, now = Kind("masks", "iou", masks.overlap_metrics(classes)), time.monotonic()
    work = Task(args, encoder, index, features, rows, y, ("mask",), kind, leaks, now - started, now)
    return Masked(work, samples, heads, notes)


def _check(args: argparse.Namespace) -> None:
    if not 0 < args.labels <= 1:
        raise UserError(f"--labels {args.labels} must be above 0 and at most 1 (a share of the train masks)")
    if args.grades or args.positive or args.multi_label:
        raise UserError("segment judges masks: --grades, --positive and --multi-label are about class labels")
    if args.epochs < 1 or min(args.lr) <= 0:
        raise UserError("--epochs must be 1 or more, and every --lr above 0")
    if args.mask_classes and len(set(args.mask_classes)) < len(args.mask_classes):
        raise UserError("--mask-classes names a class twice")


def masked_splits(index: Index, source: str | None = None) -> tuple[dict[str, Array], dict[str, int]]:
    """split -> numbers of its samples with a mask (val only if there are any), and split -> how many have none."""
    if source is not None and source not in index.sources:
        raise UserError(f"{index.root} has no source '{source}'; it has {', '.join(index.sources) or 'none'}")
    there, column, found, without = masks.with_mask(index), index.column("split"), {}, {}
    ours = np.ones(len(index), bool) if source is None else index.column("source") == index.sources.index(source)
    for split in ("train", "val", "test"):
        chosen = ours & (column == (index.splits.index(split) if split in index.splits else -1))
        own = np.flatnonzero(chosen & there).astype(np.int64)
        if len(own):
            found[split] = own
        elif split != "val":
            raise UserError(
                f"{index.root} has no mask in split '{split}' ({int(chosen.sum()):,} images without one): segmentation "
                "needs train and test masks; build the index from a table with mask and split columns"
            )
        if chosen.sum() > len(own):
            without[split] = int(chosen.sum()) - len(own)
    return found, without


def finish(work: Masked, name: str, heads: list[Head], counts: Array, bits: Array, seconds: float) -> Path:
    """counts int64 [seeds, N, K, 3] and predicted masks as bits [seeds, N, K, B] of the test rows -> results.json."""
    job, samples, protocol = work.task, work.samples, f"segment_{name}"
    test, truth = job.test, samples.masks[job.test]
    seeds, n, classes = counts.shape[:3]
    unused = np.zeros(n, dtype=np.int64)
    found = metrics.bootstrap(unused, counts.reshape(seeds, n, -1), samples.group[test], job.kind.metrics)
    used = [job.split(seed) for seed in job.args.seeds]
    about = job.about(protocol)
    about["data"]["masks"] = samples.classes
    about["data"]["classes"] = {
        label: {s: int((samples.masks[r] == k).any((1, 2)).sum()) for s, r in job.rows.items()}
        for k, label in enumerate(samples.classes, 1)
    }
    carved = f"val, carved out of train: {task.CARVED:.0%} by groups"
    about["selected"] = {
        "split": "val" if "val" in job.rows else carved,
        "by": "iou",
        "grid": grid(name, job.args),
        "choices": [
            {"seed": seed, **head.choice, "val": round(head.val, 4)}
            for seed, head in zip(job.args.seeds, heads, strict=True)
        ],
    }
    about["cost"] = {
        "seconds": round(seconds, 2),
        "labels_used": {"train": [len(train) for train, _ in used], "val": [len(val) for _, val in used]},
        "peak_memory_mb": task.peak_mb(),
    }
    silent = int(np.isnan(masks.iou(counts)).any((0, 2)).sum())
    about["notes"] = [*job.notes([train for train, _ in used]), *work.notes]
    if silent:
        about["notes"].append(f"{silent:,} test images lack a class in truth and prediction: not in that class's mean")
    said = segment_page.said(about, found["dice"])
    about["detail"] = {"mask_size": samples.size, "curves": [head.curve for head in heads], "said": said}
    arrays = {
        "counts": counts,
        "iou": masks.iou(counts).astype(np.float32),
        "dice": masks.dice(counts).astype(np.float32),
        "masks": bits,
        "truth": masks.pack(truth, classes),
        "group": samples.group[test],
        "number": samples.numbers[test],
    }
    path = results.write(job.args.out / protocol, about, found, **arrays)
    predicted = masks.unpack(bits[0], samples.size)
    dice = masks.mean_known(arrays["dice"][0])
    html = segment_page.page(results.read(path), job.index, samples.numbers[test], truth, predicted, dice)
    html.write(path.with_name("report.html"))
    task.show(protocol, about, found, path)
    return path


def grid(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Among what val chose."""
    if name == "knn":
        return {"k": KS, "background": BACKGROUNDS, "temperature": TEMPERATURE, "bank": BANK}
    return {"lr": args.lr, "optimizer": "Adam", "batch": BATCH, "epochs": args.epochs, "loss": "cross-entropy"}
