"""k nearest neighbours on frozen features: votes weighted by exp(cosine / 0.07), k chosen on val (DINO's protocol).

Nothing is trained, so it asks what the features themselves put side by side. Only the class token is used.
"""

from __future__ import annotations

import argparse

from finetune import task
from finetune.metrics import point
from hybridssl.errors import UserError
from hybridssl.probe import neighbours, vote

KS = (5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07


def add_arguments(parser: argparse.ArgumentParser) -> None:
    task.add_arguments(parser)
    parser.add_argument("--k", type=int, nargs="+", default=list(KS), metavar="K", help=f"numbers to choose from {KS}")


def run(args: argparse.Namespace) -> None:
    if min(args.k) < 1:
        raise UserError(f"--k {min(args.k)} must be 1 or more")
    work = task.prepare(args, ["knn"])
    x, y, classes = work.features.x["cls"], work.y, len(work.classes)
    scores, choices = [], []
    for seed in args.seeds:
        train, val = work.split(seed)
        grid = sorted({min(k, len(train)) for k in args.k})
        cosine, index = neighbours(x[train], x[val], grid[-1])
        tried = {k: vote(cosine[:, :k], y[train][index[:, :k]], classes, TEMPERATURE) for k in grid}
        val_scores = {k: point(task.SELECT_BY, y[val], tried[k]) for k in grid}
        k = max(grid, key=lambda k: val_scores[k])  # the smallest of equals
        cosine, index = neighbours(x[train], x[work.test], k)
        scores.append(vote(cosine, y[train][index], classes, TEMPERATURE))
        choices.append({"k": k, "val": round(val_scores[k], 4)})
    work.finish("knn", scores, choices, {"k": args.k, "temperature": TEMPERATURE, "features": "cls"})
