"""Curves with a band around each: how a figure grows with the number of labels, or falls with a fault's severity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from hybridssl.charts import WIDTH, _cycle, _heading, _line, _short, _svg, _ticks
from hybridssl.page import Markup

Band = Sequence[tuple[float, float, float, float]]  # x, value, low, high; NaN ends: no band there


def band_chart(
    series: Mapping[str, Band], title: str = "", x_label: str = "", height: int = 220, log: bool = True
) -> Markup:
    """One or several curves by name, each point marked. log: x, then above 0, on a logarithmic axis.

    Raises ValueError when no value is finite.
    """
    place = math.log if log else float
    curves = {name: [p for p in sorted(points) if math.isfinite(p[1])] for name, points in series.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        raise ValueError("a chart needs at least one finite point")
    every = [p for points in curves.values() for p in points]
    ys = [y for p in every for y in p[1:] if math.isfinite(y)]
    ticks, xs = _ticks(min(ys), max(ys), 4), sorted({p[0] for p in every})
    low, high = ticks[0], ticks[-1]
    top, bottom, left, right = 46, height - 38, 40, WIDTH - 12
    first, span = place(xs[0]), (place(xs[-1]) - place(xs[0])) or 1.0

    def at(x: float, y: float) -> str:
        across = left + (place(x) - first) / span * (right - left)
        return f"{across:.1f},{bottom - (y - low) / ((high - low) or 1.0) * (bottom - top):.1f}"

    parts = [_heading(title)]
    for value in ticks:
        y = at(xs[0], value).split(",")[1]
        parts.append(f'<path class="axis" d="M{left} {y}H{right}"/>')
        parts.append(f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for x in xs:
        across = at(x, low).split(",")[0]
        parts.append(f'<text x="{across}" y="{bottom + 16}" text-anchor="middle">{_short(x)}</text>')
    parts.append(f'<text x="{right}" y="{height - 4}" text-anchor="end">{escape(x_label)}</text>')
    for (name, points), colour in zip(curves.items(), _cycle(len(curves)), strict=True):
        sure = [p for p in points if math.isfinite(p[2]) and math.isfinite(p[3])]
        outline = " ".join([*(at(p[0], p[3]) for p in sure), *(at(p[0], p[2]) for p in reversed(sure))])
        parts.append(f'<polygon points="{outline}" fill="{colour}" fill-opacity=".16"/>')
        parts.append(_line(" ".join(at(p[0], p[1]) for p in points), colour, 2, 1))
        for x, value, lower, upper in points:
            across, down = at(x, value).split(",")
            band = f" [{lower:.3f}, {upper:.3f}]" if math.isfinite(lower) and math.isfinite(upper) else ""
            tip = f"<title>{escape(name)}, {_short(x)}: {value:.3f}{band}</title>"
            parts.append(f'<circle cx="{across}" cy="{down}" r="3.5" fill="{colour}">{tip}</circle>')
    if len(curves) > 1:
        spans = "".join(
            f'<tspan fill="{colour}" dx="{0 if i == 0 else 10}">● </tspan>{escape(name)}'
            for i, (name, colour) in enumerate(zip(curves, _cycle(len(curves)), strict=True))
        )
        parts.append(f'<text x="0" y="33">{spans}</text>')
    return _svg(WIDTH, height, parts, title)
