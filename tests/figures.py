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
    "pixels, late, text prototypes": "pixels-for-ibot",
    "pixels, no labels": "ssl-pixels",
    "late, text prototypes": "hybrid-late-text",
    "late, random prototypes": "hybrid-late",
    "late, words that learn first": "hybrid-late-text-warm",
    "late, words frozen": "hybrid-late-text-frozen",
    "late, random, drawn class by class": "hybrid-late-balanced",
    "late, domain removed": "hybrid-late-no-domain",
    "late, domain removed at full strength": "hybrid-late-no-domain-strong",
    "late, KDE for KoLeo": "kde-for-koleo",
    "DermINO's formulation": "dermino",
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
    """Likewise of the budget's table."""
    one, _, other = name.partition(" - ")
    cells = budget_gap(one, other) if other else {k: interval(v) for k, v in budget()["arms"][BUDGET[one]].items()}
    return f"| {name} | {' | '.join(cells[column] for column in columns)} |"


def budget_gap(one: str, other: str) -> dict[str, str]:
    """One arm minus another by figure, arms as pages call them; in the results it may stand the other way round."""
    gaps = {(gap["a"], gap["b"]): gap for gap in budget()["differences"]}
    a, b = BUDGET[one], BUDGET[other]
    gap = gaps.get((a, b)) or {k: turned(v) for k, v in gaps[b, a].items() if isinstance(v, dict)}
    return {name: interval(row, "+") for name, row in gap.items() if isinstance(row, dict)}


def budget() -> dict[str, Any]:
    return read("budget-cpu")
