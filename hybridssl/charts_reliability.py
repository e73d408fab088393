"""The reliability diagram: how often what was said with some confidence came true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hybridssl.charts import WIDTH, _heading, _svg
from hybridssl.page import COLOURS, GREY, Markup

_WIDEST = 14  # radius of a dot that holds all images


def reliability_diagram(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], title: str = "", height: int = 300
) -> Markup:
    """Frequency over mean confidence, one curve a name, the diagonal dashed; a dot's area is its bin's share of images.

    A bin holds `confidence`, `frequency` and `count`. Below the diagonal the model is too sure of itself.
    """
    left, right, top, bottom = 34, WIDTH - _WIDEST, 46, height - 38

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * (right - left), bottom - y * (bottom - top)

    parts = [_heading(title)]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = at(tick, tick)
        parts.append(f'<path class="axis" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="{"end" if tick == 1 else "middle"}">{tick:g}</text>'
        )
    parts.append(f'<text x="{right}" y="{height - 4}" text-anchor="end">confidence</text>')
    (x0, y0), (x1, y1) = at(0, 0), at(1, 1)
    parts.append(f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="{GREY}" stroke-dasharray="4 4" fill="none"/>')
    keys = []
    for (name, bins), colour in zip(curves.items(), COLOURS, strict=False):
        total = sum(b["count"] for b in bins)
        points = [at(b["confidence"], b["frequency"]) for b in bins]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" stroke-opacity=".6"/>')
        for (x, y), b in zip(points, bins, strict=True):
            radius = 2 + (_WIDEST - 2) * (b["count"] / total) ** 0.5
            said = f"{name}: {b['count']:,.0f} at confidence {b['confidence']:.2f}, true {b['frequency']:.2f}"
            tip = f"<title>{escape(said)}</title>"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}" fill-opacity=".55">{tip}</circle>'
            )
        keys.append(f'<tspan fill="{colour}" dx="{10 if keys else 0}">● </tspan>{escape(name)}')
    parts.append(f'<text x="0" y="33">{"".join(keys)}</text>')
    return _svg(WIDTH, height, parts, title)
