"""The rows of tables that pages show, written anew from benchmarks/results: each figure in its own cell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
HAM = {  # how pages call the arms of benchmarks/ham.py
    "hybrid": ("hybrid", "`ham-cpu` (self-supervised + labels)", "self-supervised + labels (hybrid)"),
    "ssl": ("self-supervised", "the same without labels"),
    "labels": ("the labels alone",),
    "random": ("random weights", "random"),
    "histogram": ("colour histogram + thumbnail", "histogram"),
}

BUDGET = {  # and those of `benchmarks/budget.py --size cpu`
    "late, text prototypes": "hybrid-late-text",
    "late, random prototypes": "hybrid-late",
    "no labels": "ssl",
    "labels alone": "labels",
    "random weights": "random",
}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def interval(row: Mapping[str, float], sign: str = "") -> str:
    return f"{{value:{sign}.3f}} [{{low:{sign}.3f}}, {{high:{sign}.3f}}]".format(**row)


def turned(row: Mapping[str, float]) -> dict[str, float]:
    """Of a - b: b - a."""
    return {"value": -row["value"], "low": -row["high"], "high": -row["low"]}


def ham_row(name: str, columns: Sequence[tuple[str, str]]) -> str:
    """`| name | figure | ... |`, name as a page writes it, columns as (protocol, share of the labels)."""
    document, called = read("ham-cpu"), {word: arm for arm, words in HAM.items() for word in words}
    if name in called:
        cells = [interval(document["metrics"][f"{called[name]}-{n} {p}"]["balanced_accuracy"]) for p, n in columns]
    else:
        one, other = (called[part] for part in name.split(" - "))
        cells = [interval(document["differences"][f"{one} - {other}, {p}, labels {n}"], "+") for p, n in columns]
    return f"| {name} | {' | '.join(cells)} |"


def budget_row(name: str, columns: Sequence[str]) -> str:
    """Likewise of the budget's table; a difference may stand there the other way round."""
    document = read("budget-cpu")
    if name in BUDGET:
        cells = [interval(document["arms"][BUDGET[name]][column]) for column in columns]
        return f"| {name} | {' | '.join(cells)} |"
    one, other = (BUDGET[part] for part in name.split(" - "))
    gaps = {(gap["a"], gap["b"]): gap for gap in document["differences"]}
    if (one, other) in gaps:
        cells = [interval(gaps[one, other][column], "+") for column in columns]
    else:
        cells = [interval(turned(gaps[other, one][column]), "+") for column in columns]
    return f"| {name} | {' | '.join(cells)} |"
