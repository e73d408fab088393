"""Train a small head on a few masks, or prompt a large model case after case: which measures lesions better, and at
what cost?

After 2311.04847 ("Are foundation models efficient for medical image segmentation?"): what a clinic wants of a mask are
the measurements read off it, so the arms are judged by how well area, longest diameter, asymmetry, border irregularity
and colour variegation agree with those of the true mask (Bland-Altman, intraclass correlation, Lin's concordance,
correlation), beside IoU and Dice.

  self-supervised   a head on the frozen --backbone, trained on N labelled masks, for each N of --labels-counts. A fifth
                    of the N, by whole groups, chooses; no other mask is looked at, so N is all that has to be labelled.
  promptable        a SamModel (--promptable hf:facebook/sam-vit-base, or a folder), not trained at all, with a box, one
                    point or three points a case. Prompts are drawn from the true mask and moved by 5 % of its size.

For images with one structure each (a lesion, a ventricle). Where the meta column `mm_per_pixel` is there for every test
image, measurements are in mm. Without --promptable the first half runs alone.

  python -m finetune efficiency --backbone models/derm-s --promptable hf:facebook/sam-vit-base --data data/masks \\
      --labels-counts 5 10 50 all --out results/derm-s
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from finetune import efficiency_page, options, results, task
from finetune.arms import Arm, Truth, columns, pixel_lengths, read, statistics_of
from finetune.efficiency_figures import compare, costs, describe, pairs
from finetune.encoder import Encoder
from finetune.features import Features, groups_of
from finetune.kinds import Kind
from finetune.masks import FOREGROUND, overlap_metrics
from finetune.measurements import NAMES, largest
from finetune.patch_samples import Samples, collect
from finetune.patches import load_encoder
from finetune.promptable import JITTER, KINDS, PROMPTS, Promptable, load_promptable
from finetune.resample import enough, resample
from finetune.segment import masked_splits
from finetune.segmenters import HEADS, train_head
from finetune.splits import Leaks, find_leaks, guard, label_subset
from hybridssl.errors import UserError
from shards.index import Index

Array = np.ndarray
CHOOSING = 0.2  # share of the labelled masks that chooses
TOGETHER = 0.9  # share of a mask that its largest part holds, if it shows one structure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--backbone", required=True, metavar="SPEC", help=options.FORMS)
    add("--data", required=True, type=Path, metavar="DIR", help="index with masks in its train and test splits")
    add("--out", required=True, type=Path, metavar="DIR", help="where DIR/efficiency/ goes")
    add("--promptable", metavar="SPEC", help="a SamModel: hf:ID or a folder with its weights and processor")
    add("--head", choices=sorted(HEADS), default="linear", help="what is trained on the frozen features (linear)")
    add(
        "--labels-counts",
        nargs="+",
        type=_count,
        default=[5, 10, 50, 0],
        metavar="N",
        help="labelled masks to train on (5 10 50 all)",
    )
    add("--source", help="only images of this source of the index")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="draws of masks, of heads and of prompts (0)")
    add("--size", type=int, metavar="PX", help="image size, and the grid of all masks; default: the backbone's own")
    add("--batch", type=int, default=64, help="images a forward pass of the backbone (64)")
    add("--workers", type=int, default=0, help="processes that decode images (0: none beside this one)")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:1 | mps")
    add("--allow-leak", action="store_true", help="go on when evaluation images leak; the report says so in red")
    add("--overwrite", action="store_true", help="replace another result in --out")
    parser.set_defaults(labels=1.0)  # of which --labels-counts takes its own shares


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    index, device = Index.open(args.data), task.device_of(args.device)
    numbers = {split: own for split, own in masked_splits(index, args.source)[0].items() if split != "val"}
    encoder = load_encoder(args.backbone, args.seeds[0], device, args.size)
    leaks = guard(find_leaks(index, numbers, encoder.digests), args.allow_leak)
    data = {"sha256": index.sha256, "labels": args.labels, "source": args.source}
    identity = {"protocol": "efficiency", "backbone": encoder.about(), "data": data}
    results.check_room(args.out / "efficiency", identity, args.overwrite)
    promptable = load_promptable(args.promptable, device) if args.promptable else None
    _same_promptable(args.out / "efficiency", promptable, args.overwrite)

    group = groups_of(index, numbers["train"])
    counts = sorted({count or len(group) for count in args.labels_counts if count <= len(group)})
    if not counts:
        raise UserError(f"--labels-counts: the train split of {index.root} has {len(group):,} masks; ask for fewer")
    drawn = {seed: numbers["train"][annotated(group, seed)[: counts[-1]]] for seed in args.seeds}
    wanted = np.concatenate([np.unique(np.concatenate(list(drawn.values()))), numbers["test"]])
    samples = collect(encoder, index, wanted, FOREGROUND, (HEADS[args.head],), args.batch, args.workers)
    arms, choices, used = train(args, samples, drawn, counts)
    arms += [Arm(PROMPTS[kind], prompts=max(1, points), kind=kind) for kind, points in KINDS.items() if promptable]
    test = np.flatnonzero(np.isin(samples.numbers, numbers["test"]))
    empty = ~samples.masks[test].any((1, 2))
    test = test[~empty]
    if len(test) < 3:
        raise UserError(f"{index.root} has {len(test)} test masks with a structure in them; agreement needs 3 at least")
    lengths, given = pixel_lengths(index, samples.numbers[test], samples.size)
    truth = read(arms, args.seeds, index, samples, test, lengths, promptable)

    rows = {"train": np.flatnonzero(np.isin(samples.numbers, numbers["train"])), "test": test}
    job = _task(args, encoder, index, samples, rows, leaks)
    detail: dict[str, Any] = {
        "unit": "mm" if given == len(test) else "px",
        "grid": samples.size,
        "head": args.head,
        "cases": len(test),
        "promptable": None if promptable is None else {"name": promptable.name, "sha256": promptable.sha256},
        "jitter": JITTER if promptable else None,
        "compute": costs(encoder, promptable, arms, index, samples, test, args.head),
    }
    about = job.about("efficiency") | {
        "selected": {
            "split": f"a part of the labelled masks: {CHOOSING:.0%} by groups",
            "by": "iou",
            "grid": {"head": args.head, "masks": counts},
            "choices": choices,
        },
        "cost": {"seconds": 0.0, "labels_used": used, "peak_memory_mb": 0.0},
        "notes": job.notes([rows["train"]]) + notes(args, samples, test, int(empty.sum()), given, len(group)),
        "detail": detail,
    }
    finish(args.out / "efficiency", about, arms, truth, samples, test, started)


def finish(
    folder: Path, about: dict[str, Any], arms: list[Arm], truth: Truth, samples: Samples, test: Array, started: float
) -> None:
    """Intervals and comparisons of what was read, then results.json, the measurements of every case, and the page."""
    work = {f"{arm.name}: {name}": of for arm in arms for name, of in statistics_of(arm, truth).items()}
    resamples = enough(len(pairs(arms)))
    draws = resample(work, samples.group[test], resamples, doing="resampling groups")
    detail = about["detail"]
    detail |= {
        "resamples": resamples,
        "arms": [describe(arm, truth, draws) for arm in arms],
        "comparisons": compare(arms, draws),
    }
    detail["said"] = [*efficiency_page.said(detail), efficiency_page.NOT_SHOWN]
    about["cost"] |= {"seconds": round(time.monotonic() - started, 2), "peak_memory_mb": task.peak_mb()}
    found = {name: draws[f"{arm}: {statistic}"].interval for name, arm, statistic in headline(arms, detail)}
    arrays = {"group": samples.group[test], "number": samples.numbers[test]}
    arrays |= {f"truth_{name}": truth.values[name] for name in NAMES}
    for arm in arms:
        key = arm.kind or f"masks_{arm.masks}"
        arrays[f"counts_{key}"] = np.stack([np.concatenate(own) for own in arm.counts])[:, :, 0]
        arrays |= {f"{name}_{key}": np.stack([columns(own)[name] for own in arm.values]) for name in NAMES}
    path = results.write(folder, about, found, **arrays)
    efficiency_page.page(about, arms, truth, path).write(path.with_name("report.html"))
    task.show("efficiency", about, found, path)


def headline(arms: list[Arm], detail: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(metric of results.json, arm, statistic): the head with most masks under plain names, prompts under theirs."""
    names = ["iou", "dice", "icc", *(f"{measure} icc_2_1" for measure in detail["arms"][0]["measures"])]
    most = max((arm for arm in arms if arm.masks), key=lambda arm: arm.masks)
    asked = [arm for arm in arms if arm.kind]
    return [(n, most.name, n) for n in names] + [(f"{n} ({arm.name})", arm.name, n) for arm in asked for n in names[:3]]


def annotated(groups: Array, seed: int) -> Array:
    """Positions of all images in the order in which they would be labelled: at random, but one of every group (patient)
    before a second of any, so that few masks show many patients. The first N are part of the first N + 1."""
    order = np.random.default_rng(seed).permutation(len(groups))
    turn = np.zeros(len(groups), dtype=np.int64)
    seen: dict[int, int] = {}
    for at in order:
        turn[at] = seen[int(groups[at])] = seen.get(int(groups[at]), -1) + 1
    return order[np.argsort(turn[order], kind="stable")]


def train(
    args: argparse.Namespace, samples: Samples, drawn: dict[int, Array], counts: list[int]
) -> tuple[list[Arm], list[dict[str, Any]], dict[str, list[int]]]:
    """An arm for every count, what was chosen for each of its seeds, and the masks that the largest one used."""
    row = {int(number): at for at, number in enumerate(samples.numbers)}
    arms, choices = [], []
    used: dict[str, list[int]] = {"train": [], "val": []}
    for count in counts:
        heads = []
        for seed in args.seeds:
            own = np.array([row[int(n)] for n in drawn[seed][:count] if int(n) in row])
            choosing = label_subset(np.zeros(len(own), int), samples.group[own], CHOOSING, seed, keep_one=True)
            if not choosing.any():
                raise UserError(f"--labels-counts {count}: masks of two patients are needed, to train and to choose")
            head = train_head(args.head, samples, own[~choosing], own[choosing], seed)
            heads.append(head)
            choices.append({"seed": seed, "masks": count, **head.choice, "val": round(head.val, 4)})
            if count == counts[-1]:
                used["train"].append(int((~choosing).sum()))
                used["val"].append(int(choosing.sum()))
        arms.append(Arm(f"{count:,} masks", masks=count, heads=heads))
    return arms, choices, used


def _task(
    args: argparse.Namespace, encoder: Encoder, index: Index, samples: Samples, rows: dict[str, Array], leaks: Leaks
) -> task.Task:
    """What says in results.json which backbone and data these are; one class, the structure."""
    source, none = np.asarray(index.column("source")[samples.numbers]), np.zeros((len(samples.numbers), 1), np.uint8)
    features = Features({}, none, samples.numbers, source, samples.group, FOREGROUND, index, samples.bad)
    kind = Kind("masks", "iou", overlap_metrics(FOREGROUND))
    return task.Task(args, encoder, index, features, rows, none[:, 0].astype(int), FOREGROUND, kind, leaks, 0.0, 0.0)


def notes(
    args: argparse.Namespace,
    samples: Samples,
    test: Array,
    empty: int,
    given: int,
    available: int,
) -> list[str]:
    """What a reader of the figures must know, in plain sentences."""
    said = []
    apart = sum(int(largest(mask > 0).sum()) < TOGETHER * int((mask > 0).sum()) for mask in samples.masks[test])
    beyond = [str(count) for count in args.labels_counts if count > available]
    if not args.promptable:
        said.append("no --promptable was given: only the self-supervised half ran, and nothing was compared")
    if beyond:
        said.append(f"{', '.join(beyond)} masks were asked for, and train has {available:,}: left out")
    if empty:
        said.append(f"{empty:,} test images have an empty mask, on which nothing can be measured or prompted: left out")
    if apart > 0.1 * len(test):
        said.append(
            f"{apart:,} of {len(test):,} test masks have several parts: prompts ask for all at once, and shape is "
            "measured on the largest; figures of both are of little use here"
        )
    if 0 < given < len(test):
        said.append(f"mm_per_pixel is known for {given:,} of {len(test):,} test images only: lengths are in pixels")
    if args.head == "knn":
        said.append("the search among stored patches is not in the GFLOPs, which count matrix products of torch only")
    return said


def _count(text: str) -> int:
    """`all` is 0."""
    if text == "all":
        return 0
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} must be 2 or more (one mask to train on and one to choose), or all")
    return int(text)


def _same_promptable(folder: Path, promptable: Promptable | None, overwrite: bool) -> None:
    """UserError when `folder` holds a comparison with another promptable model, which would be lost."""
    path = folder / "results.json"
    if overwrite or not path.exists():
        return
    there = (results.read(path).about.get("detail") or {}).get("promptable")
    if there and there["sha256"] != (promptable and promptable.sha256):
        raise UserError(f"{path} compares with {there['name']}: choose another --out, or --overwrite")
