"""The page of `scaling`: a chart a backbone and a chart a method, the table behind them, and what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.judged import cell, warn
from finetune.metrics import Interval
from finetune.results import Result
from hybridssl.charts_bands import band_chart
from hybridssl.page import Markup, Page

Row = dict[str, Any]
SURE = 0.05  # adjusted p up to which a difference counts as shown


def page(result: Result) -> Path:
    """Write report.html beside results.json."""
    about, out = result.about, result.path.with_name("report.html")
    detail, data, rows = about["detail"], about["data"], about["detail"]["rows"]
    metric = detail["metric"].replace("_", " ")
    html = Page("How many labels it takes", f"{metric} on test of {data['index']}, by share of the train labels")
    warn(html, about)
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shares = sorted({row["share"] for row in rows})
    html.facts(
        [
            ("Backbones", len(backbones)),
            ("Methods", len(methods)),
            ("Seeds", len(about["seeds"])),
            ("Train labels", f"{min(r['labels'] for r in rows):,.0f} to {max(r['labels'] for r in rows):,.0f}"),
            ("Test", f"{data['splits']['test']:,} images, {data['groups']['test']:,} groups"),
        ]
    )
    lead = "Each point is the mean over the seeds; its band is the 95 % interval over resampled groups and seeds."
    html.section("By backbone", lead)
    html.figures([(_chart(rows, "backbone", name, "method"), "") for name in backbones], width=420)
    if len(backbones) > 1:
        html.section("By method", "The same points, backbones side by side.")
        html.figures([(_chart(rows, "method", name, "backbone"), "") for name in methods], width=420)
    html.section("Every cell", "Each figure is linked to the result of its cell.")
    at = {(row["backbone"], row["method"], row["share"]): row for row in rows}
    lines = []
    for backbone in backbones:
        for method in methods:
            there = [at.get((backbone, method, share)) for share in shares]
            if any(there):
                seconds = sum(row["seconds"] for row in there if row)
                moved = next((row["parameters"] for row in there if row and row["parameters"]), None)
                figures = [row and cell(_interval(row), result.path.parent / row["result"], out) for row in there]
                lines.append([_name(backbone), method, *figures, moved, round(seconds)])
    header = ["backbone", "method", *(_share(rows, share) for share in shares), "parameters trained", "seconds"]
    html.table(header, lines)
    html.section("What this shows, and what not")
    for sentence in said(detail["paired"], rows, metric, len(about["seeds"])):
        html.text(sentence)
    return html.write(out)


def said(paired: list[Row], rows: list[Row], metric: str, seeds: int) -> list[str]:
    """The comparisons in plain sentences: those that hold, how many do not, and what was not asked."""
    sure = [entry for entry in paired if entry["p_holm"] <= SURE]
    found = []
    for entry in sure:
        better, worse, value = (entry["a"], entry["b"], entry["value"])
        low, high = entry["low"], entry["high"]
        if value < 0:
            better, worse, value, low, high = worse, better, -value, -high, -low
        who = [f"{method} on {_name(backbone)}" for backbone, method in (better, worse)]
        found.append(
            f"With {entry['share']:.3g} of the labels, {who[0]} is better than {who[1]}: {metric} +{value:.3f} "
            f"[{low:.3f}, {high:.3f}]."
        )
    if paired:
        found.append(
            f"{len(sure)} of {len(paired)} differences are shown (paired over groups and seeds, p at most {SURE} after "
            f"Holm's correction for {len(paired)} comparisons); for the others neither side is shown to be better, "
            "which is not the same as equal."
        )
    each = [[value for value in row["seeds"] if value is not None] or [0.0] for row in rows]
    spread = max(max(values) - min(values) for values in each)
    found.append(
        f"The {metric} of single draws of the labels differs by up to {spread:.3f} within a point ({seeds} seeds): "
        "one clinic with one draw must expect that. Not shown: labels chosen with care rather than at random, other "
        "hospitals, and what larger grids or longer training would reach."
    )
    return found


def _chart(rows: list[Row], column: str, name: str, curve: str) -> Markup:
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in rows:
        if row[column] == name:
            label = _name(row[curve])
            series.setdefault(label, []).append((100 * row["share"], row["value"], row["low"], row["high"]))
    return band_chart(series, _name(name), "% of the train labels", height=260)


def _interval(row: Row) -> Interval:
    return Interval(*(float("nan") if row[end] is None else row[end] for end in ("value", "low", "high")))


def _name(backbone: str) -> str:
    """The last part of a path: absolute paths tell nothing on a page."""
    return Path(backbone).name if "/" in backbone and ":" not in backbone else backbone


def _share(rows: list[Row], share: float) -> str:
    return f"{100 * share:.3g} % ({max(row['labels'] for row in rows if row['share'] == share):,.0f})"
