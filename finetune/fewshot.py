"""Few labels: k labelled images a class, drawn many times, and the mean over these episodes. How early is it useful?

An episode draws k images of every class from the train split, by whole patients or lesions, and classifies all test
images from these alone. `mean` takes the nearest class mean of features that are centred (on all train images, which
needs no label) and brought to unit length (SimpleShot, 1911.04623); `logistic` fits a logistic regression with C = 1
to them. Nothing is chosen, so val is not read. Intervals resample the episodes and the test groups. The curve over k
is in OUT/fewshot/report.html (OUT/fewshot-logistic for `logistic`); predictions.safetensors holds the scores of the
episodes with the most images a class.

  python -m finetune fewshot --backbone models/derm-s --data data/derm --shots 1 5 10 --out results/derm-s
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from finetune import episodes, options, task, written
from finetune.metrics import Interval
from finetune.pages import begin, cell, close, plain, title
from hybridssl.charts_bands import band_chart
from hybridssl.errors import UserError
from hybridssl.page import Page
from shards.terminal import Terminal

Array = np.ndarray
SHOTS = (1, 5, 10, 20)
PROTOCOLS = {"mean": "fewshot", "logistic": "fewshot-logistic"}
SAID = {"mean": "nearest class mean", "logistic": "logistic regression, C = 1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    add = parser.add_argument
    add("--shots", type=int, nargs="+", default=list(SHOTS), metavar="K", help=f"labelled images a class {SHOTS}")
    add("--episodes", type=int, default=100, metavar="N", help="draws of these images for every seed (100)")
    add("--methods", nargs="+", choices=PROTOCOLS, default=["mean"], help="nearest class mean, logistic (mean)")


def run(args: argparse.Namespace) -> None:
    if min(args.shots) < 1 or args.episodes < 2:
        raise UserError("--shots must be 1 or more and --episodes 2 or more: an interval needs several draws")
    if args.multi_label:
        raise UserError("fewshot draws k images of each class, which needs one class an image: leave --multi-label out")
    work = task.prepare(args, [PROTOCOLS[method] for method in args.methods])
    x, shots = work.features.x["cls"], sorted(set(args.shots))
    for method in args.methods:
        scores: dict[int, list[Array]] = {k: [] for k in shots}
        have = np.full(len(work.classes), np.iinfo(np.int64).max)
        for seed in args.seeds:
            train = work.taught(seed)
            mean = x[train].mean(0, dtype=np.float64)
            own, queries = (episodes.centre(x[rows], mean) for rows in (train, work.test))
            y, group = work.y[train], work.features.group[train]
            have = np.minimum(have, work.counts(train))
            order = episodes.draw(y, group, len(work.classes), shots[-1], args.episodes, seed)
            for k, found in zip(shots, _classify(method, own, order, shots, queries), strict=True):
                scores[k].append(found.astype(np.float32))
        _judge(work, method, {k: np.concatenate(parts) for k, parts in scores.items()}, have)


def _classify(
    method: str, x: np.ndarray, order: np.ndarray, shots: list[int], queries: np.ndarray
) -> Iterator[np.ndarray]:
    """For each number of shots the scores [E, N, K] of the queries, with a progress bar where it takes long."""
    if method == "mean":
        yield from episodes.nearest_mean(x, order, shots, queries)
        return
    with Progress(console=Terminal(stderr=True)) as progress:
        bar = progress.add_task("logistic regressions", total=len(shots) * len(order))
        yield from episodes.logistic(x, order, shots, queries, lambda: progress.advance(bar))


def _judge(work: task.Task, method: str, scores: dict[int, Array], have: Array) -> None:
    """Metrics with intervals, results.json and page. scores: k -> [E, N, K]; have: train images a class has."""
    y, group = work.y[work.test], work.features.group[work.test]
    found: dict[str, Interval] = {}
    each: dict[str, list[float]] = {}
    with Progress(console=Terminal(stderr=True), transient=True) as progress:
        bar = progress.add_task("intervals", total=len(scores) * len(work.kind.metrics))
        for name, metric in work.kind.metrics.items():
            for k, values in scores.items():
                draws, own = episodes.spread(metric, y, values, group)
                found[f"{name}@{k}"] = draws.interval
                each[f"{name}@{k}"] = [round(float(v), 4) for v in own]
                progress.advance(bar)
    most = max(scores)
    notes = work.notes([work.taught(seed) for seed in work.args.seeds])
    short = [f"{c} ({n:,})" for c, n in zip(work.classes, have, strict=True) if 0 < n < most]
    if short:
        notes.append(f"fewer than {most} train images of {', '.join(short)}: an episode takes all of them instead")
    fixed = {"method": SAID[method], "episodes": work.args.episodes, "shots": list(scores), "features": "cls, CL2N"}
    labels = [int(np.minimum(have, most).sum())] * len(work.args.seeds)
    detail = {"shots": list(scores), "episodes": each, "said": said(work.kind.select_by, list(scores), found, each)}
    path, about = written.write_fixed(work, PROTOCOLS[method], found, fixed, labels, notes, detail, scores=scores[most])
    page(about, found, path).write(path.with_name("report.html"))


def page(about: dict[str, Any], found: dict[str, Interval], path: Path) -> Page:
    """The curve over the number of shots, and every figure in a table, linked to results.json."""
    out, data, shots = path.with_name("report.html"), about["data"], about["detail"]["shots"]
    names = list(dict.fromkeys(name.rsplit("@", 1)[0] for name in found))
    lead = about["task"]["select_by"]
    html = Page(
        f"{about['backbone']['name']} with few labels",
        f"{about['selected']['grid']['method']}, on test of {data['index']}",
    )
    begin(html, about, path)
    episodes_run = len(next(iter(about["detail"]["episodes"].values())))
    html.section("Labelled images a class", "Mean over the episodes; the band is its 95 % interval.")
    curves = [lead, *(name for name in ("macro_auroc",) if name in names and name != lead)]
    html.figures(
        [
            (
                band_chart({name: [(k, *_ends(found[f"{name}@{k}"])) for k in shots]}, title(name), "images a class"),
                f"{episodes_run:,} episodes a point",
            )
            for name in curves
        ]
    )
    rows = [[k, *(cell(found[f"{name}@{k}"], path, out) for name in names)] for k in shots]
    html.table(["images a class", *map(plain, names)], rows)
    close(html, about, path)
    return html


def said(lead: str, shots: list[int], found: dict[str, Interval], each: dict[str, list[float]]) -> list[str]:
    """The curve in words, what one draw must expect, and what was not asked."""
    curve = "; ".join(f"with {k} labelled images a class {found[f'{lead}@{k}']}" for k in shots)
    worst, best = np.percentile(each[f"{lead}@{shots[0]}"], [5, 95])
    return [
        f"{title(lead)}, mean over the draws: {curve}.",
        "An interval is of that mean, over other draws and other patients like these. One clinic makes one draw: with "
        f"{shots[0]} a class, nine in ten gave between {worst:.3f} and {best:.3f}.",
        "Not shown: what a classifier tuned on a validation set, or an adapted backbone, would reach. And every class "
        "had as many labels, which a clinic gets only by looking for the rare.",
    ]


def _ends(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high
