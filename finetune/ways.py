"""A way to use labels: a head on frozen features, or a backbone that is adapted. Taught and asked alike."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune import adapt, adapters, heads
from finetune.adapters import Change
from finetune.encoder import Encoder
from finetune.task import Task
from hybridssl.errors import UserError

Array = np.ndarray
ADAPTED = tuple(f"adapt-{mode}" for mode in adapt.MODES if mode != "partial")
METHODS = (*sorted(heads.GRIDS), *ADAPTED)


@dataclass(frozen=True)
class Taught:
    predict: Callable[[Array], Array]  # rows of the task -> probabilities float64 [M, K]
    choice: dict[str, Any]  # what val chose, and its figure there
    parameters: dict[str, Any] | None = None  # of an adapted backbone: how many, and how many of them moved


def teach(work: Task, method: str, args: Namespace, train: Array, val: Array, seed: int) -> Taught:
    """One of METHODS, taught by the rows `train` of a task and chosen on the rows `val`."""
    if method in heads.GRIDS:
        x = work.features.x
        head = heads.fit(method, x, work.y, train, val, work.kind, len(work.classes), seed)
        return Taught(lambda rows: head.predict(heads.take(x, rows)), {**head.choice, "val": round(head.val, 4)})
    found = adapt.fit(work, train, val, adapt.plan_of(args, _change(method)), seed)
    return Taught(found.predict, found.choice, found.classifier.counts())


def settings(args: Namespace, method: str) -> dict[str, Any]:
    """All that a method is told beside backbone, data and seeds, as JSON gives it back."""
    chosen = heads.GRIDS[method] if method in heads.GRIDS else adapt.plan_of(args, _change(method)).as_dict()
    return json.loads(json.dumps(chosen))


def possible(methods: Sequence[str], encoder: Encoder) -> tuple[list[str], list[str]]:
    """The methods that this backbone allows, and a sentence on those that it does not."""
    adapted = [method for method in methods if method in ADAPTED]
    if not adapted:
        return list(methods), []
    try:
        adapters.require_trainable(encoder)
        return list(methods), []
    except UserError as error:
        return [m for m in methods if m not in adapted], [f"left out {', '.join(adapted)}: {error}"]


def _change(method: str) -> Change:
    return Change(method.removeprefix("adapt-"))
