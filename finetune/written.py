"""The writing of a result whose figures are not `Task.finish`'s one score an image: results.json, and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune import results, task
from finetune.metrics import Interval
from finetune.results import Result

Array = np.ndarray


def write(
    work: task.Task,
    protocol: str,
    found: dict[str, Interval],
    selected: dict[str, Any],
    labels_used: dict[str, list[int]],
    arrays: dict[str, Array],
    notes: list[str],
    **more: Any,
) -> Result:
    """OUT/PROTOCOL/results.json and the table on the terminal; more: further entries, such as `detail` for the page."""
    split = "val" if "val" in work.rows else f"val, carved out of train: {task.CARVED:.0%} by groups"
    about = work.about(protocol) | {
        "selected": {"split": split, "by": work.kind.select_by, **selected},
        "cost": {"seconds": work.seconds(), "labels_used": labels_used, "peak_memory_mb": task.peak_mb()},
        "notes": notes,
        **more,
    }
    path = results.write(work.args.out / protocol, about, found, **arrays)
    task.show(protocol, about, found, path)
    return results.read(path)


def write_fixed(
    work: task.Task,
    protocol: str,
    found: dict[str, Interval],
    fixed: dict[str, Any],
    labels: Sequence[int],
    notes: Sequence[str],
    detail: dict[str, Any],
    **arrays: Array,
) -> tuple[Path, dict[str, Any]]:
    """As `write`, where nothing was chosen on val. fixed: what was set before any label was seen; labels: how many
    train labels each seed used; labels, groups and numbers of the test images go beside `arrays`."""
    choices = [{"seed": seed, **fixed} for seed in work.args.seeds]
    selected = {"split": results.FIXED, "grid": fixed, "choices": choices}
    used = {"train": list(labels), "val": [0] * len(labels)}
    rows = {"y": work.y, "group": work.features.group, "number": work.features.numbers}
    rows = {name: values[work.test] for name, values in rows.items()}
    result = write(work, protocol, found, selected, used, {**rows, **arrays}, list(notes), detail=detail)
    return result.path, result.about
