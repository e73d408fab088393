"""Find similar cases: rank the train images by likeness to each test image. How many of the first are of its class?

Exact cosine search over the class token; nothing is trained and nothing is chosen. An image of the query's own patient
or lesion is never an answer. Reported: precision@k (share of the first k of the same class), recall@k (share of all
images of the class that are among the first k), hit@k (is any of the first k of the class), mAP; each over all test
images, and `balanced`: the mean over classes, where a rare class weighs as much as a common one. With --multi-label an
image is right when it shares a label. OUT/retrieve/report.html shows queries, drawn at random, with their nearest.

  python -m finetune retrieve --backbone models/derm-s --data data/derm --out results/derm-s
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from finetune import gallery, options, task, written
from finetune.metrics import Interval
from finetune.pages import begin, cell, close
from finetune.ranking import Ranked, rank
from finetune.resample import resample
from hybridssl.errors import UserError
from hybridssl.page import Markup, Page, inline
from shards.terminal import Terminal

Array = np.ndarray
KS = (1, 5, 10)
SHOWN = 24  # queries on the page, as evenly over the classes as they go
NEAREST = 6  # answers beside each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    add = parser.add_argument
    add("--k", type=int, nargs="+", default=list(KS), metavar="K", help=f"how many answers are looked at {KS}")
    add("--gallery", choices=("train", "val", "test"), default="train", help="the split that is searched (train)")


def run(args: argparse.Namespace) -> None:
    if min(args.k) < 1:
        raise UserError(f"--k {min(args.k)} must be 1 or more")
    if args.positive or args.grades:
        raise UserError("retrieve asks whether two cases share a label: leave --positive and --grades out")
    work = task.prepare(args, ["retrieve"])
    if args.gallery not in work.rows:
        raise UserError(f"--gallery {args.gallery}: {work.index} has no labelled image in that split")
    ks, test = sorted(set(args.k)), work.test
    answers = [work.taught(seed) if args.gallery == "train" else work.rows[args.gallery] for seed in args.seeds]
    ranked = [_rank(work, rows, [*ks, NEAREST]) for rows in answers]
    values = {name: np.stack([one.measures[name] for one in ranked]) for name in ranked[0].measures}  # [S, Q]
    values = {name: v for name, v in values.items() if name in ("average_precision", *_names(ks))}
    asked = work.y[test] if work.kind.multi_label else np.eye(len(work.classes))[work.y[test]]  # [Q, K]
    statistics = {}
    for name, value in values.items():
        short, mean = name.replace("average_precision", "mAP"), value.mean(0)
        statistics[short] = lambda weight, mean=mean: weight @ mean / weight.sum(1)
        statistics[f"balanced_{short}"] = lambda weight, mean=mean: _over_classes(weight, mean, asked)
    draws = resample(statistics, work.features.group[test], doing="intervals")
    notes = work.notes([np.arange(len(work.y))])  # all rows: nothing is taught here, so no class is untaught
    count = np.min([work.counts(rows) for rows in answers], axis=0)
    lacking = [c for c, n, q in zip(work.classes, count, work.counts(test), strict=True) if q and not n]
    if lacking:
        notes.append(f"no {args.gallery} image of {', '.join(lacking)}: nothing right can be found for its test images")
    numbers = work.features.numbers
    found = {name: d.interval for name, d in draws.items()}
    nearest = [np.where(r.nearest < 0, -1, numbers[a[r.nearest]]) for r, a in zip(ranked, answers, strict=True)]
    path, about = written.write_fixed(
        work,
        "retrieve",
        found,
        {"gallery": args.gallery, "k": ks, "features": "cls", "likeness": "cosine"},
        [len(rows) for rows in answers],
        notes,
        {"gallery": args.gallery, "images": [len(rows) for rows in answers], "said": said(ks, found, args.gallery)},
        nearest=np.stack(nearest),
        cosine=np.stack([one.cosine for one in ranked]).astype(np.float32),
        **{name: value.astype(np.float32) for name, value in values.items()},
    )
    page(work, ranked[0], answers[0], about, found, path).write(path.with_name("report.html"))


def _names(ks: list[int]) -> list[str]:
    return [f"{what}@{k}" for what in ("precision", "recall", "hit") for k in ks]


def _rank(work: task.Task, answers: Array, ks: list[int]) -> Ranked:
    """The rows `answers` of the features, ranked for every test image."""
    x, y, group, test = work.features.x["cls"], work.y, work.features.group, work.test

    def relevant(queries: Array, order: Array) -> Array:
        if not work.kind.multi_label:
            return y[answers][order] == y[test][queries, None]
        shared = y[test][queries].astype(np.float32) @ y[answers].astype(np.float32).T > 0  # [q, G]
        return np.take_along_axis(shared, order, 1)

    with Progress(console=Terminal(stderr=True), transient=True) as progress:
        bar = progress.add_task("queries", total=len(test))
        return rank(x[test], x[answers], relevant, group[test], group[answers], ks, lambda n: progress.advance(bar, n))


def _over_classes(weight: Array, value: Array, asked: Array) -> Array:
    """Mean over the classes that a resample contains of the mean over its queries: [R, Q], [Q], [Q, K] -> [R]."""
    count = weight @ asked
    mean = np.divide(weight @ (asked * value[:, None]), count, out=np.full(count.shape, np.nan), where=count > 0)
    return np.nanmean(mean, axis=1)


# ------------------------------------------------------------------------------------------------------------- the page


def page(
    work: task.Task, ranked: Ranked, answers: Array, about: dict[str, Any], found: dict[str, Interval], path: Path
) -> Page:
    """Figures, then queries with their nearest images, each marked as right or wrong."""
    out, split = path.with_name("report.html"), about["detail"]["gallery"]
    html = Page(
        f"{about['backbone']['name']}: similar cases", f"test images, looked up among {split}, {about['data']['index']}"
    )
    begin(html, about, path)
    html.section("How often the nearest are right", "k: how many answers are looked at.")
    names = [name for name in found if not name.startswith("balanced_")]
    rows = [[name, cell(found[name], path, out), cell(found[f"balanced_{name}"], path, out)] for name in names]
    html.table(["", "over all queries", "mean over classes"], rows)
    chosen = draw(work.y[work.test], SHOWN)
    html.section(
        "Queries and their nearest",
        f"{len(chosen)} test images, drawn at random as evenly over the classes as they go, not picked by result. "
        "✓: of the same class; ✗: not. The number is the cosine.",
    )
    html.images([_line(work, ranked, answers, q) for q in chosen], ["query", *map(str, range(1, NEAREST + 1))])
    close(html, about, path)
    return html


def said(ks: list[int], found: dict[str, Interval], gallery: str) -> list[str]:
    """What is found, in words, and what that does not say."""
    k = ks[len(ks) // 2]
    first = f"Of the {k} most similar cases" if k > 1 else "Of the most similar cases"
    return [
        f"{first} in {gallery}, {found[f'precision@{k}']} share the query's label; with every class weighing as much, "
        f"{found[f'balanced_precision@{k}']}.",
        "Likeness here is what the backbone makes of an image, with nothing fitted to these labels. A class with few "
        "images cannot reach a high precision@k, nor one with many a high recall@k.",
        "Not shown: that such cases help a reader, or that cases alike to the eye are alike in course.",
    ]


def draw(y: Array, count: int, seed: int = 0) -> list[int]:
    """Positions of about `count` queries, the classes (of several labels, the first) in turn, random inside each."""
    label = y.argmax(1) if y.ndim == 2 else y
    order = np.random.default_rng(seed).permutation(len(label))
    each = max(1, count // len(np.unique(label)))
    chosen = [order[label[order] == c][:each] for c in np.unique(label)]
    return [int(q) for part in chosen for q in part][:count]


def _line(work: task.Task, ranked: Ranked, answers: Array, query: int) -> list[tuple[bytes, Markup]]:
    near = [int(j) for j in ranked.nearest[query, :NEAREST] if j >= 0]
    at = work.test[query]
    rows = np.array([at, *answers[near]], dtype=np.int64)
    images = gallery.thumbnails(work.index, work.features.numbers[rows], 112)
    line = [(images[0], Markup(f"<b>{inline(_label(work, at))}</b>"))]
    for image, row, cosine in zip(images[1:], rows[1:], ranked.cosine[query], strict=False):
        same = (work.y[at] * work.y[row]).any() if work.kind.multi_label else work.y[at] == work.y[row]
        tone, mark = ("good", "✓") if same else ("bad", "✗")
        words = f"{inline(_label(work, row))} {cosine:.2f}"
        line.append((image, Markup(f'<b style="color:var(--{tone})">{mark}</b> {words}')))
    return line


def _label(work: task.Task, row: int) -> str:
    y = work.y[row]
    return ", ".join(c for c, has in zip(work.classes, y, strict=True) if has) if y.ndim else work.classes[int(y)]
