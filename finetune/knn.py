"""k nearest neighbours on frozen features: votes weighted by exp(cosine / 0.07), k chosen on val (DINO's protocol).

Nothing is trained, so it asks what the features themselves put side by side. Only the class token is used.

  python -m finetune knn --backbone models/derm-s --data data/derm --out results/derm-s
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune import options, task
from finetune.kinds import Kind
from hybridssl.errors import UserError
from hybridssl.probe import neighbours

Array = np.ndarray
KS = (5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    options.column_argument(parser)
    parser.add_argument("--k", type=int, nargs="+", default=list(KS), metavar="K", help=f"numbers to choose from {KS}")


def run(args: argparse.Namespace) -> None:
    if min(args.k) < 1:
        raise UserError(f"--k {min(args.k)} must be 1 or more")
    work = task.prepare(args, ["knn"])
    x, scores, val_scores, choices = work.features.x, [], [], []
    for seed in args.seeds:
        train, val = work.split(seed)
        voter = fit(x, work.y, train, val, work.kind, len(work.classes), args.k)
        scores.append(voter.predict({"cls": x["cls"][work.test]}))
        val_scores.append(voter.predict({"cls": x["cls"][val]}))
        choices.append({**voter.choice, "val": round(voter.val, 4)})
    work.finish("knn", scores, choices, {"k": args.k, "temperature": TEMPERATURE, "features": "cls"}, val_scores)
    task.suggest(args, "knn")


@dataclass(frozen=True)
class Voter:
    """Neighbours that vote, with the k that did best on val."""

    x: Array  # [N, D]
    ballots: Array  # [N, K], what each neighbour votes for
    val: float
    choice: dict[str, Any]

    def predict(self, x: dict[str, Array]) -> Array:
        """kind -> [M, D] of one backbone, as in `Features.x` -> shares of the votes [M, K]."""
        return vote(*neighbours(self.x, x["cls"], self.choice["k"]), self.ballots)


def fit(
    x: dict[str, Array],
    y: Array,
    train: Array,
    val: Array,
    kind: Kind,
    classes: int,
    ks: Sequence[int] = KS,
) -> Voter:
    """The rows `train` as voters, with the k of `ks` that does best on the rows `val` (the smallest of equals).

    x: kind -> [N, D]; y: int64 [N], or uint8 [N, K] for several labels an image.
    """
    ballots = y[train] if kind.multi_label else np.eye(classes, dtype=np.uint8)[y[train]]
    grid = sorted({min(k, len(train)) for k in ks})
    cosine, index = neighbours(x["cls"][train], x["cls"][val], grid[-1])
    reached = {k: kind.point(y[val], vote(cosine[:, :k], index[:, :k], ballots)) for k in grid}
    k = max(grid, key=lambda k: reached[k])
    return Voter(x["cls"][train], ballots, reached[k], {"k": k})


def vote(cosine: Array, index: Array, ballots: Array) -> Array:
    """Ballots of the neighbours `index` [M, k], weighted by exp(cosine / T): shares [M, K] (Wu 2018, section 3.4)."""
    weight = np.exp((cosine - cosine[:, :1]) / TEMPERATURE)  # the first is the largest: no overflow
    weight /= weight.sum(1, keepdims=True)
    total = np.zeros((len(cosine), ballots.shape[1]))
    for j in range(weight.shape[1]):  # a neighbour at a time: [M, k, K] does not fit for many images
        total += weight[:, j, None] * ballots[index[:, j]]
    return total
