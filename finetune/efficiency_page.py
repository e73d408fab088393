"""The page of `efficiency`, and in plain sentences what its figures show and what they do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from finetune.arms import Arm, Truth, columns
from finetune.measurements import unit
from finetune.metrics import Interval
from finetune.pages import begin, cell, close
from finetune.results import interval
from hybridssl.charts_agreement import bland_altman_chart
from hybridssl.charts_bands import band_chart
from hybridssl.page import Markup, Page

TITLES = {"dice": "Dice", "icc": "Mean ICC(2,1) of the measurements"}
STATISTICS = {
    "icc_2_1": "ICC(2,1)",
    "icc_3_1": "ICC(3,1)",
    "lin": "Lin",
    "pearson": "Pearson",
    "spearman": "Spearman",
}
LIMITS = {"bias": "bias", "limit_low": "lower limit", "limit_high": "upper limit"}
OUTLINES = {"truth": (60, 220, 120), "found": (240, 90, 60)}  # RGB
NOT_SHOWN = (
    "Not shown: what people take to draw a mask or to give a prompt (seconds here are the machine's); prompts that "
    "people gave (these were drawn from the true masks, so they never miss the structure); a promptable model after "
    "training on such images; and other sets than this one."
)


def said(detail: dict[str, Any]) -> list[str]:
    """What was shown, from the figures alone."""
    heads = [arm for arm in detail["arms"] if arm["masks"]]
    asked = [arm for arm in detail["arms"] if arm["prompts"]]
    most = heads[-1]
    sentences = [
        f"Trained on {most['name']}, the self-supervised segmenter reaches a Dice of {_text(most['dice'])} on "
        f"{detail['cases']:,} test cases; its measurements agree with those of the true masks with a mean ICC(2,1) of "
        f"{_text(most['icc'])}."
    ]
    best = max(most["measures"], key=lambda name: most["measures"][name]["icc_2_1"]["value"], default=None)
    worst = min(most["measures"], key=lambda name: most["measures"][name]["icc_2_1"]["value"], default=None)
    if best != worst:
        ends = (f"{name} ({_text(most['measures'][name]['icc_2_1'])})" for name in (best, worst))
        sentences.append("Of the measurements, {} agrees best and {} least.".format(*ends))
    for arm in asked:
        rows = [row for row in detail["comparisons"] if row["prompt"] == arm["name"]]
        sentences.append(
            f"Prompted with {arm['name']} a case and not trained, {detail['promptable']['name']} reaches a Dice of "
            f"{_text(arm['dice'])} and a mean ICC of {_text(arm['icc'])}. {_against(rows)}"
        )
    if asked:
        ratio = detail["compute"][asked[0]["name"]]["ratio"]
        sentences.append(f"It takes {ratio:.3g} times the seconds of the self-supervised segmenter, case by case.")
    return sentences


def _against(rows: list[dict[str, Any]]) -> str:
    """How many masks it takes to do as well: by value, and as a difference that is shown."""
    words = []
    for metric, name in (("dice", "Dice"), ("icc", "ICC")):
        own = [row for row in rows if row["metric"] == metric]
        level = next((row["masks"] for row in own if row["value"] >= 0), None)
        above = next((row["masks"] for row in own if row["verdict"] == "better"), None)
        if level is None:
            below = all(row["verdict"] == "worse" for row in own)
            words.append(
                f"in {name} no number of masks reached that{'' if below else ', though not all are shown to differ'}"
            )
        else:
            shown = f"shown to be better from {above:,}" if above else "not shown to be better with any number"
            words.append(f"in {name} {level:,} masks sufficed to reach that, {shown}")
    return f"The self-supervised segmenter: {'; '.join(words)}."


def page(about: dict[str, Any], arms: Sequence[Arm], truth: Truth, path: Path) -> Page:
    detail, out = about["detail"], path.with_name("report.html")
    other = detail["promptable"]["name"] if detail["promptable"] else "no promptable model"
    html = Page(
        "A few masks, or a prompt a case", f"{about['backbone']['name']} and {other} on {about['data']['index']}"
    )
    begin(html, about, path)
    level = " A prompted model is trained on no mask: its band is level." if detail["promptable"] else ""
    html.section("How many masks it takes", f"On test, with 95 % bands.{level}")
    html.figures([(_curves(detail["arms"], name, title), "") for name, title in _curve_titles(detail).items()])
    _tables(html, detail, path, out)
    html.section(
        "Bland-Altman",
        "A point is a case: by how much the measurement differs from the truth, over the mean of both. Dashed: bias "
        "and the limits that hold 95 % of the differences, with their intervals over groups as bands.",
    )
    largest = max((arm for arm in arms if arm.masks), key=lambda arm: arm.masks)
    shown = [largest, *(arm for arm in arms if arm.kind)]
    charts = [_agreement(arm, name, truth, detail) for name in detail["arms"][0]["measures"] for arm in shown]
    html.figures(charts)
    _costs(html, detail)
    html.section("Cases", "Evenly spaced over the test split, not chosen. Green: the true outline; red: the found one.")
    html.images([_case(at, shown, truth) for at in sorted(truth.images)], ["image", *(arm.name for arm in shown)], 120)
    close(html, about, path)
    return html


def _curve_titles(detail: dict[str, Any]) -> dict[str, str]:
    measures = {f"{name} icc_2_1": f"ICC(2,1) of the {name}" for name in detail["arms"][0]["measures"]}
    return {**TITLES, **measures}


def _curves(arms: list[dict[str, Any]], name: str, title: str) -> Markup:
    """A figure over the number of masks; a prompt is level over all of them."""
    counts = [arm["masks"] for arm in arms if arm["masks"]]

    def ends(arm: dict[str, Any]) -> tuple[float, float, float]:
        measure, _, statistic = name.partition(" ")
        row = arm["measures"][measure][statistic] if statistic else arm[name]
        return row["value"], row["low"], row["high"]

    series = {"self-supervised": [(arm["masks"], *ends(arm)) for arm in arms if arm["masks"]]}
    series |= {arm["name"]: [(n, *ends(arm)) for n in (counts[0], counts[-1])] for arm in arms if arm["prompts"]}
    return band_chart(series, title, "labelled masks")


def _tables(html: Page, detail: dict[str, Any], path: Path, out: Path) -> None:
    def linked(row: dict[str, float], signed: bool = False) -> Markup | None:
        figure = interval(row)
        digits = 3 if not signed or np.isnan(figure.low) else _digits(max(abs(figure.low), abs(figure.high)))
        return cell(figure, path, out, signed, digits)

    html.section(
        "Agreement of the measurements",
        "With the truth: 1 is perfect. Intervals resample patients or lesions; 'by F' takes every case as independent.",
    )
    lines = [[arm["name"], *(linked(arm[name]) for name in ("iou", "dice", "icc"))] for arm in detail["arms"]]
    html.table(["", "IoU", "Dice", "mean ICC(2,1)"], lines)
    for name in detail["arms"][0]["measures"]:
        rows = []
        for arm in detail["arms"]:
            own = arm["measures"][name]
            plain = own["as_independent"]["icc_2_1"] if own["as_independent"] else (0, np.nan, np.nan)
            by_f = f"{plain[1]:.3f} to {plain[2]:.3f}"
            values = [linked(own[key]) for key in STATISTICS]
            rows.append(
                [arm["name"], values[0], by_f, *values[1:], *(linked(own[k], True) for k in LIMITS), own["missing"]]
            )
        header = ["", "ICC(2,1)", "by F", *list(STATISTICS.values())[1:], *LIMITS.values(), "not measurable"]
        html.table(header, rows, caption=f"{name}{_in(name, detail)}")
    if detail["comparisons"]:
        rows = [
            [
                row["metric"],
                f"{row['masks']:,} masks - {row['prompt']}",
                linked(row, True),
                f"{row['p']:.2g}",
                row["verdict"],
            ]
            for row in detail["comparisons"]
        ]
        html.table(
            ["", "difference of", "value", "p (Holm)", "self-supervised is"], rows, caption="Is one shown to be better?"
        )


def _agreement(arm: Arm, name: str, truth: Truth, detail: dict[str, Any]) -> tuple[Markup, str]:
    own = next(row for row in detail["arms"] if row["name"] == arm.name)["measures"][name]
    levels = {word: (own[key]["value"], own[key]["low"], own[key]["high"]) for key, word in LIMITS.items()}
    measured = columns(arm.values[0])[name]
    if not np.isfinite(measured - truth.values[name]).any():
        return Markup(""), f"{name}, {arm.name}: no case could be measured"
    chart = bland_altman_chart(measured, truth.values[name], levels, f"{name}, {arm.name}", unit(name, detail["unit"]))
    return chart, "points: the first seed; lines: the mean of all" if len(arm.values) > 1 else ""


def _costs(html: Page, detail: dict[str, Any]) -> None:
    html.section("What it costs", "One case at a time; medians of runs that took turns on this machine.")
    prompts = {arm["name"]: arm["prompts"] for arm in detail["arms"] if arm["prompts"]}
    masks = "; ".join(f"{arm['masks']:,}" for arm in detail["arms"] if arm["masks"])
    rows = [
        [
            name,
            0 if name in prompts else masks,
            prompts.get(name, 0),
            f"{row['parameters'] / 1e6:.3g} million",
            _three(row["gflops"]),
            _three(1000 * row["seconds"]),
            _three(row["ratio"]),
        ]
        for name, row in detail["compute"].items()
    ]
    a_case = ["prompts a case", "parameters", "GFLOPs a case", "milliseconds a case", "times the first"]
    html.table(["", "masks to label", *a_case], rows)


def _case(at: int, arms: Sequence[Arm], truth: Truth) -> list[tuple[bytes, str]]:
    image = np.ascontiguousarray(np.broadcast_to(truth.images[at].transpose(1, 2, 0), (*truth.masks[at].shape, 3)))
    return [(_png(image, {}), "")] + [
        (_png(image, {"truth": truth.masks[at], "found": arm.shown[at]}), "") for arm in arms
    ]


def _png(image: np.ndarray, masks: dict[str, np.ndarray], side: int = 240) -> bytes:
    """The image, enlarged so that outlines are thin on it, with the outline of every mask."""
    picture = cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC)
    for name, mask in masks.items():
        large = cv2.resize(mask, (side, side), interpolation=cv2.INTER_NEAREST)
        outlines, _ = cv2.findContours((large > 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outlines, -1, OUTLINES[name], 2)
    return cv2.imencode(".png", picture[..., ::-1])[1].tobytes()


def _three(value: float) -> str:
    """A positive number with about three digits and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _digits(size: float) -> int:
    """Decimals that leave about three digits of a number of this size."""
    return int(np.clip(2 - np.floor(np.log10(max(size, 1e-9))), 0, 3))


def _text(row: dict[str, float]) -> str:
    return str(Interval(row["value"], row["low"], row["high"]))


def _in(name: str, detail: dict[str, Any]) -> str:
    known = unit(name, detail["unit"])
    grid = f" of the {detail['grid']} px grid" if "px" in known else ""
    return f" (bias and limits in {known}{grid})" if known else ""
