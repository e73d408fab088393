"""The page and the terminal's table of `calibrate`, made from its results.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from finetune.metrics import Interval
from finetune.pages import begin, cell, close, plain
from finetune.results import interval
from hybridssl.charts_reliability import reliability_diagram
from hybridssl.page import Page
from shards.terminal import Terminal

ERRORS = {
    "ece": "expected calibration error, 15 bins of equal width",
    "adaptive_ece": "the same, bins of equally many images",
    "brier": "Brier score",
    "nll": "negative log likelihood",
}
SETS = {"lac": "LAC: the smallest sets on average", "aps": "APS: coverage spread over easy and hard images"}
COVERAGE = ("coverage", "coverage, groups alike", "set size", "empty sets")
Found = dict[str, Interval]


def page(about: dict[str, Any], found: Found, path: Path) -> Page:
    out, detail = path.with_name("report.html"), about["detail"]
    judged, data = about["judged"]["protocol"], about["data"]
    html = Page(f"{about['backbone']['name']}: what its probabilities are worth", f"{plain(judged)} on {data['index']}")
    begin(html, about, path)
    html.section("Calibration", "Before and after one temperature, set on val, which does not change the first choice.")
    heading, below, of = "Share that was right, by confidence", "too sure of itself", "test images"
    if about["task"]["kind"] == "multi-label":
        heading, below, of = "Share that had the label, by its probability", "too high", "test images and labels"
    caption = f"Under the dashed line it is {below}. A dot's area is its share of the {of}."
    html.figures([(reliability_diagram(detail["reliability"], heading), caption)])
    ways = ("", "_scaled", "_change")
    rows = [
        [said, *(cell(found[f"{name}{way}"], path, out, signed=way == "_change") for way in ways)]
        for name, said in ERRORS.items()
    ]
    html.table(["", "as it is", "scaled", "change"], rows)
    if detail["at"]:
        html.section("Disease or not", f"Disease: {', '.join(detail['positive'])}. Each threshold was set on val.")
        html.table(
            ["fixed on val", "threshold", "sensitivity, test", "specificity, test"],
            [
                [name.replace("=", " "), _first(about, name), cell(found[f"sensitivity at {name}"], path, out),
                 cell(found[f"specificity at {name}"], path, out)]
                for name in _fixed(detail)
            ],
        )  # fmt: skip
    for method in SETS if detail["sets"] else ():
        html.section(f"Prediction sets, {method.upper()}", f"{SETS[method]}. Asked for: {1 - detail['alpha']:.0%}.")
        everyone = {f"{c} ({method})": found[f"{c} ({method})"] for c in COVERAGE}
        table = [["all", data["splits"]["test"], *(cell(m, path, out) for m in everyone.values())]]
        for member, count in detail["members"].items():
            per = [interval(detail["coverage"][f"{c} ({method}, {member})"]) for c in COVERAGE]
            table.append([member, count, *(cell(m, path, out) for m in per)])
        html.table(["test images", "count", *COVERAGE], table)
    close(html, about, path)
    return html


def sentences(about: dict[str, Any], found: Found) -> list[str]:
    """What was shown, and what was not."""
    detail, bins = about["detail"], about["detail"]["reliability"]["as it is"]
    total = sum(b["count"] for b in bins)
    confidence, frequency = (sum(b[side] * b["count"] for b in bins) / total for side in ("confidence", "frequency"))
    change, temperatures = found["nll_change"], [c["temperature"] for c in about["selected"]["choices"]]
    effect = "lowered" if change.high < 0 else "raised" if change.low > 0 else "was not shown to change"
    off, gap = confidence > frequency, f"by {abs(confidence - frequency):.2f}"
    if about["task"]["kind"] == "multi-label":  # one event a label, and most labels are absent: no share of being right
        first = f"As it is, it gives a label {confidence:.2f} on average, and {frequency:.2f} have it: "
        first += f"{'too high' if off else 'too low'} {gap}."
    else:
        first = f"As it is, it says {confidence:.2f} on average and is right {frequency:.2f} of the time: "
        first += f"{'too sure' if off else 'not sure enough'} {gap}."
    said = [
        first,
        f"A temperature of {', '.join(f'{t:.2f}' for t in temperatures)} {effect} the negative log likelihood: "
        f"{found['nll']} before, {found['nll_scaled']} after; calibration error {found['ece']}, then "
        f"{found['ece_scaled']}.",
    ]
    for method in SETS if detail["sets"] else ():
        covered, asked, slack = found[f"coverage ({method})"], 1 - detail["alpha"], detail["spread"]
        low, high = asked - slack, asked + slack
        where = "above" if covered.low > high else "below" if covered.high < low else "in keeping with"
        said.append(
            f"{method.upper()} sets hold the right class for {covered} of the test images, {where} the {asked:.2f} "
            f"asked for, with {found[f'set size ({method})'].value:.2f} classes on average."
        )
        per = {name: detail["coverage"][f"coverage ({method}, {name})"] for name in detail["members"]}
        short = [name for name, m in per.items() if m["high"] < low]
        if short:
            said.append(f"{method.upper()} covers less than asked for in: {', '.join(short)}.")
    if detail["sets"]:
        said.append(
            f"Another val of this size would move the coverage by up to {detail['spread']:.3f}: the promise is an "
            "average over such draws, and over all patients, not one for each class or subgroup."
        )
    if detail["at"]:
        said.append("The intervals of sensitivity and specificity take the thresholds as given: val could set others.")
    said.append("Not shown: that the probabilities hold in another hospital, where diseases are more or less frequent.")
    return said


def show(about: dict[str, Any], found: Found, path: Path) -> None:
    """The result as tables on the terminal."""
    console, detail = Terminal(), about["detail"]
    title = f"{about['protocol']}: {about['backbone']['name']} on {about['data']['index']}"
    console.print(title, style="bold", soft_wrap=True)
    table = Table("", "as it is", "scaled")
    for name in ERRORS:
        table.add_row(name, str(found[name]), str(found[f"{name}_scaled"]))
    console.print(table)
    if detail["at"]:
        table = Table("fixed on val", "sensitivity, test", "specificity, test")
        for name in _fixed(detail):
            table.add_row(name, str(found[f"sensitivity at {name}"]), str(found[f"specificity at {name}"]))
        console.print(table)
    for sentence in detail["said"]:
        console.print(sentence)
    for note in about["notes"]:
        console.print(f"note: {note}")
    console.print(f"written: {path} and report.html beside it", soft_wrap=True)


def _fixed(detail: dict[str, Any]) -> list[str]:
    return [f"{fixed}={at:g}" for fixed in ("specificity", "sensitivity") for at in detail["at"]]


def _first(about: dict[str, Any], name: str) -> str:
    values = [choice[f"threshold at {name}"] for choice in about["selected"]["choices"]]
    return ", ".join(f"{v:.3f}" for v in values)
