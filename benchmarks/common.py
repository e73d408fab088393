"""What result files share: on which machine, at which commit, with which versions; and the figure they compare by."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.metrics import balanced_accuracy
from finetune.resample import RESAMPLES, Draws, Statistic, mean, mean_of_drawn, resample
from finetune.results import Result

RESULTS = Path(__file__).parent / "results"


def drawn(result: Result, count: int = RESAMPLES) -> Draws:
    """Balanced accuracy of a result, the mean of its seeds, with `count` resamples of the test groups, and of the seeds
    where these are draws of a part of the labels."""
    arrays = result.predictions()

    def accuracy(scores: np.ndarray) -> Statistic:
        return lambda weight: balanced_accuracy(arrays["y"], scores, weight)

    draws = resample({str(s): accuracy(scores) for s, scores in enumerate(arrays["scores"])}, arrays["group"], count)
    return (mean_of_drawn if result.drawn_labels else mean)(list(draws.values()))


def machine() -> dict[str, Any]:
    """Processor, cores, GPU, versions and commit; nothing that names the host or a path."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "gpu": gpu,
            "simd": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {name: version(name) for name in ("torch", "timm", "lightly", "accelerate")},
        "python": platform.python_version(),
        "commit": os.environ.get("HYBRIDSSL_COMMIT") or _commit(),
    }


def _commit() -> str:
    """Of the tree that runs; HYBRIDSSL_COMMIT names it where there is a copy without git."""
    if shutil.which("git") is None:
        return "unknown"
    head, dirty = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "-uno")
    return (head or "unknown") + ("+changes" if dirty else "")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()


def write_results(name: str, document: dict[str, Any]) -> Path:
    """benchmarks/results/NAME, pretty and stable, so that a difference between two runs reads well."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / name
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(RESULTS.parent.parent)}")
    return path


def write_section(name: str, section: str, figures: dict[str, Any], command: str) -> Path:
    """One section of benchmarks/results/NAME, with its own machine and commit; the others stay."""
    path = RESULTS / name
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return write_results(
        name, dict(sorted({**document, section: {**machine(), "command": command, **figures}}.items()))
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
