"""Result folders as the verbs that evaluate a backbone write them, of simulated patients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.special import softmax

from finetune import judged, kinds, metrics, results
from finetune.judged import Judged, Part

CLASSES = ("akiec", "mel", "nv")


def patients(images: int, seed: int = 0, size: int = 1, sharp: float = 2.0, classes: int = 3, first: int = 0) -> Part:
    """Perfectly calibrated scores: y is drawn from them. `size` images a group, which share much of their logits."""
    rng = np.random.default_rng(seed)
    group = np.arange(images) // size
    shared = rng.normal(size=(group.max() + 1, classes))[group] * (size > 1)
    scores = softmax(sharp * (rng.normal(size=(images, classes)) + 2 * shared), axis=1)
    y = (scores.cumsum(1) < rng.random((images, 1))).sum(1).clip(max=classes - 1)
    return Part(scores, y, group + 1 + first, np.arange(images) + first)


def write(
    folder: Path,
    test: Part,
    val: list[Part] | None = None,
    name: str = "models/mine",
    kind: kinds.Kind | None = None,
    classes: tuple[str, ...] = CLASSES,
    **data,
) -> Path:
    """The folder of a result; test.scores [N, K], or [S, N, K] for several seeds."""
    kind = kind or kinds.choose("one-of", classes)
    scores = test.scores if test.scores.ndim == 3 else test.scores[None]
    val, choices = val or [], [{"seed": s} for s in range(len(scores))]
    grid = data.pop("grid", {})
    about = {
        "protocol": data.pop("protocol", "knn"),
        "task": kind.as_dict(),
        "backbone": {"name": name, "sha256": name, "baseline": False, "dim": 8, "input_size": 32},
        "data": {
            "index": "data/derm",
            "sha256": "d" * 64,
            "synthetic": False,
            "source": None,
            "labels": 1.0,
            "splits": {"train": 100, "val": len(val[0].y) if val else 20, "test": len(test.y)},
            "groups": {"train": 50, "val": 10, "test": len(np.unique(test.group))},
            "group_column": "group",
            "classes": {c: {"train": 50, "val": 10, "test": 20} for c in classes},
            "bad": [],
            **data,
        },
        "selected": {"split": "val", "by": kind.select_by, "grid": grid, "choices": choices},
        "seeds": list(range(len(scores))),
        "cost": {"seconds": 3.25, "labels_used": {"train": [100], "val": [20]}, "peak_memory_mb": 100.0},
        "leaks": {"pretraining": 0, "groups": 0, "images": 0, "allowed": False},
        "notes": [],
    }  # fmt: skip
    arrays = {"y": test.y, "group": test.group, "number": test.number}
    for s, part in enumerate(val):
        own = {"scores": part.scores.astype(np.float32), "y": part.y, "group": part.group, "number": part.number}
        arrays |= {f"val_{key}_{s}": values for key, values in own.items()}
    found = metrics.bootstrap(test.y, scores, test.group, kind.metrics, resamples=20)
    results.write(folder, about, found, scores=scores.astype(np.float32), **arrays)
    return folder


def without_scores(folder: Path, like: Path, protocol: str = "retrieve") -> Path:
    """The folder of a result on the images of another one whose protocol keeps no score of a class."""
    known = results.read(like / "results.json")
    arrays = {name: values for name, values in known.predictions().items() if name in ("y", "group", "number")}
    results.write(folder, {**known.about, "protocol": protocol}, {}, **arrays)
    return folder


def opened(folder: Path) -> Judged:
    return judged.read(results.read(folder / "results.json"))


def flip(part: Part, share: float, seed: int = 0) -> Part:
    """The same images with the scores of a share of them turned to another class: a worse model."""
    hit = np.random.default_rng(seed).random(len(part.y)) < share
    scores = part.scores.copy()
    scores[hit] = np.roll(scores[hit], 1, axis=1)
    return Part(scores, part.y, part.group, part.number)


def point(name: str, y: np.ndarray, scores: np.ndarray) -> float:
    """The metric on the data as they are."""
    return float(metrics.ONE_OF[name](y, scores, np.ones((1, len(y))))[0])
