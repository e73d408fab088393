"""Linear probes on frozen features: logistic regression (C sweep) and SGD (learning-rate grid), chosen on val.

Both weigh classes inversely to their frequency, because what is reported first is balanced accuracy and medical sets
are mostly one class; both standardise features on the training rows; both choose between the class token alone and the
class token with the mean patch. The classifier reported is the one trained on train: val labels choose, nothing else.

  python -m finetune probe --backbone models/derm-s --data data/derm --out results/derm-s
  python -m finetune probe --backbone models/derm-s --data data/derm --labels 0.1 --seeds 0 1 2 --out results/derm-s-10
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from finetune import options, task
from finetune.kinds import Kind

Array = np.ndarray
CS = tuple(round(float(c), 8) for c in 10.0 ** np.r_[-5:2.1:0.5, 3:4.1])
LRS = tuple(round(float(lr), 8) for lr in 10.0 ** np.arange(-4, 0.1, 0.5))
BATCH, EPOCHS, STEPS = 256, 50, (500, 12_500)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    options.column_argument(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which probes (both)")


def run(args: argparse.Namespace) -> None:
    work = task.prepare(args, args.methods)
    for name in args.methods:
        heads = []
        for seed in args.seeds:
            train, val = work.split(seed)
            heads.append(fit(work.features.x, work.y, train, val, work.kind, len(work.classes), seed, name))
        scores, val_scores = ([head.predict(x) for head, x in zip(heads, parts, strict=True)] for parts in xs(work))
        choices = [{**head.choice, "val": round(head.val, 4)} for head in heads]
        grid = {**METHODS[name][1], "features": list(readouts(work.features.x)), "class_weight": weighing(work.kind)}
        work.finish(name, scores, choices, grid, val_scores)
    task.suggest(args, args.methods[0])


def xs(work: task.Task) -> tuple[list[dict[str, Array]], list[dict[str, Array]]]:
    """The features of test and of val, once a seed."""
    x = work.features.x
    rows = [work.split(seed)[1] for seed in work.args.seeds]
    take = lambda at: {kind: values[at] for kind, values in x.items()}  # noqa: E731
    return [take(work.test)] * len(rows), [take(at) for at in rows]


@dataclass(frozen=True)
class Head:
    """A fitted probe: link(features @ weight + bias), on features as the backbone gives them."""

    weight: Array  # float64 [D, K]; the standardisation is folded in
    bias: Array  # float64 [K]; -inf for a class that was not trained on
    readout: str  # which features it reads
    multi_label: bool
    val: float  # what it reached on val, by the metric that chooses
    choice: dict[str, Any]

    def predict(self, x: dict[str, Array]) -> Array:
        """kind -> [N, D] of one backbone, as in `Features.x` -> probabilities [N, K]."""
        return link(readouts(x)[self.readout] @ self.weight + self.bias, self.multi_label)


def fit(
    x: dict[str, Array],
    y: Array,
    train: Array,
    val: Array,
    kind: Kind,
    classes: int,
    seed: int = 0,
    method: str = "logistic",
) -> Head:
    """The probe that does best on the rows `val`, trained on the rows `train`: over its own grid and all readouts.

    x: kind -> [N, D]; y: int64 [N], or uint8 [N, K] for several labels an image. method: logistic | linear.
    """
    best: Head | None = None
    for readout, values in readouts(x).items():
        mean, scale = spread(values[train])
        x_train, x_val = (((values[rows] - mean) * scale).astype(np.float32) for rows in (train, val))
        for weight, bias, choice in METHODS[method][0](x_train, y[train], classes, kind, seed):
            reached = kind.point(y[val], link(x_val @ weight + bias, kind.multi_label))
            if best is None or reached > best.val:
                folded = scale[:, None] * weight
                choice = {**choice, "features": readout}
                best = Head(folded, bias - mean @ folded, readout, kind.multi_label, reached, choice)
    assert best is not None
    return best


def readouts(x: dict[str, Array]) -> dict[str, Array]:
    """What a probe may see: the class token, and the class token with the mean of the patches."""
    both = {"cls+patch_mean": np.concatenate([x["cls"], x["patch_mean"]], 1)} if "patch_mean" in x else {}
    return {"cls": x["cls"], **both}


def weighing(kind: Kind) -> str | None:
    """Classes that exclude each other weigh the same in training; each of several labels is a question of its own."""
    return None if kind.multi_label else "balanced"


def spread(train: Array) -> tuple[Array, Array]:
    """Mean and inverse deviation of the training rows, float64 [D]; a feature that does not vary there gets scale 0."""
    mean, deviation = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    varies = deviation > 1e-6 * np.maximum(1, np.abs(mean))
    return mean, np.where(varies, 1 / np.maximum(deviation, 1e-12), 0)


def link(logits: Array, multi_label: bool) -> Array:
    """Probabilities: a sigmoid a label, or a softmax over the classes (a class at -inf gets 0)."""
    with np.errstate(invalid="ignore"):  # a learning rate that was too high leaves no number
        return np.nan_to_num(expit(logits) if multi_label else softmax(logits, axis=-1))


Candidate = tuple[Array, Array, dict[str, Any]]  # weight [D, K], bias [K], what was chosen


def logistic(x: Array, y: Array, classes: int, kind: Kind, seed: int) -> Iterator[Candidate]:
    """Logistic regression by L-BFGS, each C from the one before; multinomial, or one against the rest a label."""
    targets = [y[:, k] for k in range(classes)] if kind.multi_label else [y]
    models = [LogisticRegression(class_weight=weighing(kind), max_iter=200, warm_start=True) for _ in targets]
    for c in CS:
        weight, bias, converged = np.zeros((x.shape[1], classes)), np.full(classes, -np.inf), True
        for k, (model, target) in enumerate(zip(models, targets, strict=True)):
            if kind.multi_label and target.min() == target.max():
                bias[k] = 0 if target.max() else -np.inf  # a label that all or none of the training images have
                continue
            model.C = c
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # noted as `converged`
                model.fit(x, target)
            converged &= int(np.max(model.n_iter_)) < model.max_iter
            own = np.asarray(model.intercept_)
            if kind.multi_label:
                weight[:, k], bias[k] = model.coef_[0], own[0]
            elif len(model.classes_) == 2:  # scikit-learn keeps the difference of the two
                weight[:, model.classes_[1]] = model.coef_[0]
                bias[model.classes_] = 0, own[0]
            else:
                weight[:, model.classes_], bias[model.classes_] = model.coef_.T, own
        yield weight, bias, {"C": c, "converged": converged}


def linear(x: Array, y: Array, classes: int, kind: Kind, seed: int) -> Iterator[Candidate]:
    """DINOv2's linear probe scaled down: SGD, momentum 0.9, no decay, cosine, all learning rates at once."""
    images, multi = torch.from_numpy(x), kind.multi_label
    target = torch.from_numpy(y).float() if multi else torch.eye(classes)[torch.from_numpy(y)]  # [N, K]
    present = target.sum(0)
    weight = target @ (len(target) / (present > 0).sum() / present.clamp(min=1))  # "balanced", as in scikit-learn
    weight = torch.ones(len(target)) if multi else weight
    lrs = torch.tensor(LRS)[:, None, None]
    w, b = torch.zeros(len(LRS), x.shape[1], classes), torch.zeros(len(LRS), 1, classes)
    momentum_w, momentum_b = torch.zeros_like(w), torch.zeros_like(b)
    steps = int(np.clip(EPOCHS * len(x) / BATCH, *STEPS))
    draw = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.randperm(len(x), generator=draw) for _ in range(-(-steps * BATCH // len(x)))])
    for step in range(steps):
        at = rows[step * BATCH : (step + 1) * BATCH]
        logits = images[at] @ w + b  # [G, B, K]
        said = logits.sigmoid() if multi else logits.masked_fill(present == 0, -torch.inf).softmax(-1)
        error = (said - target[at]) * (weight[at] / len(at))[:, None]  # the gradient of cross-entropy by the logits
        momentum_w.mul_(0.9).add_(images[at].T @ error)
        momentum_b.mul_(0.9).add_(error.sum(1, keepdim=True))
        rate = lrs * 0.5 * (1 + np.cos(np.pi * step / steps))
        w -= rate * momentum_w
        b -= rate * momentum_b
    b = b.masked_fill(present == 0, -torch.inf)
    for g, lr in enumerate(LRS):
        yield w[g].double().numpy(), b[g, 0].double().numpy(), {"lr": lr, "steps": steps}


METHODS = {
    "logistic": (logistic, {"C": CS, "solver": "lbfgs"}),
    "linear": (linear, {"lr": LRS, "optimizer": "SGD 0.9, cosine", "batch": BATCH, "epochs": EPOCHS}),
}
