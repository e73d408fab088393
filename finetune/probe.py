"""Linear probes on frozen features: logistic regression (C sweep) and SGD (learning-rate grid), chosen on val.

Both weigh classes inversely to their frequency, because what is reported first is balanced accuracy and medical sets
are mostly one class; both standardise features on the training rows; both choose between the class token alone and the
class token with the mean patch. The classifier reported is the one trained on train: val labels choose, nothing else.
"""

from __future__ import annotations

import argparse
import warnings
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from finetune import task
from finetune.metrics import point

Array = np.ndarray
CS = tuple(round(float(c), 8) for c in 10.0 ** np.r_[-5:2.1:0.5, 3:4.1])
LRS = tuple(round(float(lr), 8) for lr in 10.0 ** np.arange(-4, 0.1, 0.5))
BATCH, EPOCHS, STEPS = 256, 50, (500, 12_500)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    task.add_arguments(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which probes (both)")


def run(args: argparse.Namespace) -> None:
    work = task.prepare(args, args.methods)
    for name in args.methods:
        method, grid = METHODS[name]
        scores, choices = [], []
        for seed in args.seeds:
            train, val = work.split(seed)
            best: tuple[float, Array, dict[str, Any]] | None = None
            for kind, x in kinds(work.features.x).items():
                x_train, x_val, x_test = standardise(x[train], x[val], x[work.test])
                found = method(x_train, work.y[train], x_val, work.y[val], x_test, len(work.classes), seed)
                if best is None or found[0] > best[0]:
                    best = (found[0], found[1], {**found[2], "features": kind})
            assert best is not None
            scores.append(best[1])
            choices.append({**best[2], "val": round(best[0], 4)})
        work.finish(
            name, scores, choices, {**grid, "features": list(kinds(work.features.x)), "class_weight": "balanced"}
        )


def kinds(x: dict[str, Array]) -> dict[str, Array]:
    """What a probe may see: the class token, and the class token with the mean of the patches."""
    both = {"cls+patch_mean": np.concatenate([x["cls"], x["patch_mean"]], 1)} if "patch_mean" in x else {}
    return {"cls": x["cls"], **both}


def standardise(train: Array, *others: Array) -> list[Array]:
    """Mean 0 and deviation 1 by the training rows; a feature that does not vary there becomes 0."""
    mean, deviation = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    scale = np.where(deviation > 1e-6 * np.maximum(1, np.abs(mean)), 1 / np.maximum(deviation, 1e-12), 0)
    return [((x - mean) * scale).astype(np.float32) for x in (train, *others)]


def logistic(
    x_train: Array, y_train: Array, x_val: Array, y_val: Array, x_test: Array, classes: int, seed: int
) -> tuple[float, Array, dict[str, Any]]:
    """Multinomial logistic regression by L-BFGS, each C from the one before: (val score, test scores, choice)."""
    model = LogisticRegression(class_weight="balanced", max_iter=200, warm_start=True)
    best, kept, choice = -1.0, model, {}
    for c in CS:
        model.C = c
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # noted as `converged`
            model.fit(x_train, y_train)
        value = point(task.SELECT_BY, y_val, _spread(model, x_val, classes))
        if value > best:
            best, kept = value, deepcopy(model)
            choice = {"C": c, "converged": int(np.max(model.n_iter_)) < model.max_iter}
    return best, _spread(kept, x_test, classes), choice


def _spread(model: LogisticRegression, x: Array, classes: int) -> Array:
    """Probabilities [N, classes], where a class that was not trained on gets 0."""
    scores = np.zeros((len(x), classes))
    scores[:, model.classes_] = model.predict_proba(x)
    return scores


@torch.no_grad()
def linear(
    x_train: Array, y_train: Array, x_val: Array, y_val: Array, x_test: Array, classes: int, seed: int
) -> tuple[float, Array, dict[str, Any]]:
    """DINOv2's linear probe scaled down: SGD, momentum 0.9, no decay, cosine, all learning rates at once."""
    x, y = torch.from_numpy(x_train), torch.from_numpy(y_train)
    present = torch.bincount(y, minlength=classes)
    weight = len(y) / (present > 0).sum() / present.clamp(min=1)  # "balanced", as in scikit-learn
    lrs = torch.tensor(LRS)[:, None, None]
    w, b = torch.zeros(len(LRS), x.shape[1], classes), torch.zeros(len(LRS), 1, classes)
    momentum_w, momentum_b = torch.zeros_like(w), torch.zeros_like(b)
    steps = int(np.clip(EPOCHS * len(y) / BATCH, *STEPS))
    draw = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.randperm(len(y), generator=draw) for _ in range(-(-steps * BATCH // len(y)))])
    for step in range(steps):
        at = rows[step * BATCH : (step + 1) * BATCH]
        error = _softmax(x[at] @ w + b, present)  # [G, B, K]: the gradient of cross-entropy by the logits
        error[:, torch.arange(len(at)), y[at]] -= 1
        error *= (weight[y[at]] / len(at))[:, None]
        momentum_w.mul_(0.9).add_(x[at].T @ error)
        momentum_b.mul_(0.9).add_(error.sum(1, keepdim=True))
        rate = lrs * 0.5 * (1 + np.cos(np.pi * step / steps))
        w -= rate * momentum_w
        b -= rate * momentum_b
    tried = _softmax(torch.from_numpy(x_val) @ w + b, present).nan_to_num().numpy()
    values = [point(task.SELECT_BY, y_val, scores) for scores in tried]
    g = int(np.argmax(values))
    scores = _softmax(torch.from_numpy(x_test) @ w[g] + b[g], present)
    return values[g], scores.nan_to_num().numpy(), {"lr": LRS[g], "steps": steps}


def _softmax(logits: Tensor, present: Tensor) -> Tensor:
    """Over the classes that were trained on; the others get 0."""
    return logits.masked_fill(present == 0, -torch.inf).softmax(-1)


METHODS = {
    "logistic": (logistic, {"C": CS, "solver": "lbfgs"}),
    "linear": (linear, {"lr": LRS, "optimizer": "SGD 0.9, cosine", "batch": BATCH, "epochs": EPOCHS}),
}
