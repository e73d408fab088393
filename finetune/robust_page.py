"""The page of `robust`: what the faults look like, curves over severities, drops as a heat table and with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from finetune.corruptions import corrupt
from finetune.metrics import Interval
from finetune.pages import begin, cell, close, linked, plain
from finetune.results import Result, interval
from hybridssl.charts import intervals
from hybridssl.charts_bands import band_chart
from hybridssl.charts_heat import heat_table
from hybridssl.page import Page
from hybridssl.views import resize_for_eval
from shards.format import decode
from shards.index import Index


def page(result: Result, index: Index, number: int, size: int) -> Path:
    """Write report.html beside results.json. number: the test image that shows the faults."""
    about, found, out = result.about, result.metrics, result.path.with_name("report.html")
    detail = about["detail"]
    metric, rows = plain(detail["metric"]), detail["rows"]
    faults = list(dict.fromkeys(row["corruption"] for row in rows))
    severities = sorted({row["severity"] for row in rows})
    at = {(row["corruption"], row["severity"]): row for row in rows}
    clean = interval(detail["clean"])
    html = Page(
        f"Worse photographs: {about['backbone']['name']}",
        f"{metric} on test of {about['data']['index']}; {detail['method']} head, fitted on clean images",
    )
    begin(html, about, result.path)
    figures = {"On clean images": clean, "Mean drop": found["mean_drop"]}
    html.facts([(name, linked(str(m), result.path, out)) for name, m in figures.items()])

    html.section("What the faults look like", "One test image; every image has its own draw.")
    html.images(
        [
            [
                (_small(image), f"{name} {s}" if s else name)
                for s, image in _shown(index, number, size, name, severities)
            ]
            for name in faults
        ],
        header=["clean", *(f"severity {s}" for s in severities)],
    )
    html.section("By severity", f"{metric[:1].upper()}{metric[1:]} with its 95 % band; 0 is the clean image.")
    curves = {n: [(0, *_ends(clean)), *((s, *_ends(interval(at[n, s]["value"]))) for s in severities)] for n in faults}
    html.figures([(band_chart({n: c}, n, "severity", log=False), "") for n, c in curves.items()])
    html.section("What is lost", f"Clean minus corrupted {metric}, on the same images.")
    drops = np.array([[interval(at[n, s]["drop"]).value for s in severities] for n in faults])
    most = max(0.1, float(np.nanmax(drops)))
    bars = [(n, *_ends(found[f"drop_{n}"])) for n in faults]
    html.figures(
        [
            (
                heat_table(drops, faults, list(map(str, severities)), "Drop by severity", 0, most),
                "Each number is in the table below, with its interval.",
            ),
            (intervals(bars, "Mean drop over severities"), "95 % over resampled groups; 0 is no loss."),
        ]
    )
    links = [
        [n, *(cell(interval(at[n, s]["drop"]), result.path, out, signed=True) for s in severities)] for n in faults
    ]
    html.table(["fault", *(f"severity {s}" for s in severities)], links, caption=f"Drop of {metric}")
    close(html, about, result.path)
    return html.write(out)


def said(detail: dict[str, Any], found: dict[str, Interval], few: str = "") -> list[str]:
    """What was and what was not shown, in a sentence each. few: why there are too few patients to show anything."""
    metric, rows = plain(detail["metric"]), detail["rows"]
    faults = list(dict.fromkeys(row["corruption"] for row in rows))
    severities = sorted({row["severity"] for row in rows})
    hurt = [n for n in faults if found[f"drop_{n}"].low > 0 and not few]
    spared = [n for n in faults if n not in hurt]
    costs = "; ".join(f"{n} {found[f'drop_{n}']}" for n in hurt)
    parts = [f"Faults that cost {metric}: {costs}." if hurt else f"No fault is shown to cost {metric}."]
    if few:
        parts[0] = f"No fault can be shown to cost {metric}: {few}."
    parts.append(f"These are mean drops over the severities {', '.join(map(str, severities))}.")
    if spared:
        parts.append(f"No loss is shown for {', '.join(spared)}, which does not show that there is none.")
    parts.append("Not shown: what a head fitted on such images would reach, and what the faults of a real clinic cost.")
    return parts


def _ends(m: Interval) -> tuple[float, float, float]:
    return m.value, m.low, m.high


def _shown(index: Index, number: int, size: int, name: str, severities: list[int]) -> list[tuple[int, np.ndarray]]:
    image = resize_for_eval(decode(index.read(number).image, size, index.channels), size)
    return [(0, image), *((s, corrupt(image, name, s, number)) for s in severities)]


def _small(image: np.ndarray) -> bytes:
    """uint8 [C, S, S] -> a JPEG of at most 128 pixels a side, in quality 95 so that it adds no fault of its own."""
    shown = image[:3] if len(image) >= 3 else image[:1]
    pixels = np.ascontiguousarray(shown.transpose(1, 2, 0)[..., ::-1])
    side = min(128, pixels.shape[0])
    small = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
