"""The writing of a result whose figures are not `Task.finish`'s: few shots, retrieval, classes known by their text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune import results, task
from finetune.metrics import Interval

FIXED = "no split: all was fixed beforehand"


def write(
    work: task.Task,
    protocol: str,
    found: dict[str, Interval],
    fixed: dict[str, Any],
    labels: Sequence[int],
    notes: Sequence[str],
    detail: dict[str, Any],
    **arrays: np.ndarray,
) -> tuple[Path, dict[str, Any]]:
    """results.json and what it says. fixed: what was chosen before any label was seen; labels: how many train labels
    each seed used; detail: tables and curves for the page."""
    about = work.about(protocol)
    choices = [{"seed": seed, **fixed} for seed in work.args.seeds]
    about["selected"] = {"split": FIXED, "by": work.kind.select_by, "grid": fixed, "choices": choices}
    about["cost"] = {
        "seconds": round(work.prepared + time.monotonic() - work.since, 2),
        "labels_used": {"train": list(labels), "val": [0] * len(labels)},
        "peak_memory_mb": task._peak_mb(),
    }
    work.since = time.monotonic()
    about |= {"notes": list(notes), "detail": detail}
    rows = {"y": work.y, "group": work.features.group, "number": work.features.numbers}
    rows = {name: values[work.test] for name, values in rows.items()}
    path = results.write(work.args.out / protocol, about, found, **rows, **arrays)
    task.show(protocol, about, found, path)
    return path, about
