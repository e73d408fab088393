"""Small charts as inline SVG that follow the page's colours, light or dark. Drawn 360 units wide and set about that
wide by `Page.figures`, so that their text has the same size on a desk and on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np

from hybridssl.page import COLOURS, GREY, Markup

Points = Sequence[tuple[float, float]]
WIDTH = 360


def line_chart(
    series: Mapping[str, Points],
    title: str = "",
    *,
    reference: Mapping[str, float] | None = None,
    y_range: tuple[float | None, float | None] = (None, None),
    x_label: str = "step",
    height: int = 200,
    final: bool = True,
) -> Markup:
    """One or several curves over one axis. Long curves are drawn smoothed, with the values as they came behind them.

    reference: dashed level lines by name, such as a theoretical maximum. y_range: ends of the axis, None: by the data.
    final: the last value stands beside a curve's name, which is of no use where a curve is no course of time.
    Points that are not finite are left out. Raises ValueError when no point is finite.
    """
    curves = {name: _finite(points) for name, points in series.items()}
    curves = {name: points for name, points in curves.items() if len(points)}
    if not curves:
        raise ValueError("a chart needs at least one finite point")
    every = np.concatenate(list(curves.values()))
    levels = {k: v for k, v in (reference or {}).items() if math.isfinite(v)}
    top, bottom, left, right = 46, height - 24, 40, WIDTH - 8
    ys = [*every[:, 1], *levels.values()]
    low, high = (end if end is not None else pick(ys) for end, pick in zip(y_range, (min, max), strict=True))
    ticks = _ticks(low, high, 4)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    first, last = every[:, 0].min(), every[:, 0].max()
    span = (last - first) or 1.0

    def at(points: np.ndarray) -> str:
        x = left + (points[:, 0] - first) / span * (right - left)
        y = bottom - (np.clip(points[:, 1], low, high) - low) / ((high - low) or 1.0) * (bottom - top)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))

    parts = [_heading(title)]
    for value, text in zip(ticks, _tick_texts(ticks), strict=True):
        y = at(np.array([[first, value]])).split(",")[1]
        parts.append(f'<path class="axis" d="M{left} {y}H{right}"/>')
        parts.append(f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{text}</text>')
    parts.append(f'<text x="{left}" y="{height - 6}">{_short(first)}</text>')
    parts.append(f'<text x="{right}" y="{height - 6}" text-anchor="end">{escape(x_label)} {_short(last)}</text>')
    for name, value in levels.items():
        ends = at(np.array([[first, value], [last, value]]))
        label_y = float(ends.split(",")[1].split(" ")[0]) + 14
        parts.append(f'<polyline points="{ends}" fill="none" stroke="{GREY}" stroke-dasharray="4 4"/>')
        parts.append(f'<text x="{right}" y="{label_y:.1f}" text-anchor="end">{escape(name)}</text>')
    keys = []
    for (name, points), colour in zip(curves.items(), _cycle(len(curves)), strict=True):
        smooth = _smooth(points)
        if smooth is not points:
            parts.append(_line(at(_thin(points)), colour, 1, 0.3))
        if len(points) == 1:
            x, y = at(points).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>')
        parts.append(_line(at(_thin(smooth)), colour, 2, 1))
        keys.append((name, smooth[-1, 1], colour))
    if len(keys) == 1 and final:
        parts.append(f'<text x="{right}" y="14" text-anchor="end" style="font-size:14px">{_short(keys[0][1])}</text>')
    if len(keys) > 1:
        spans = "".join(
            f'<tspan fill="{c}" dx="{0 if i == 0 else 10}">● </tspan>{escape(name)} {_short(value) if final else ""}'
            for i, (name, value, c) in enumerate(keys)
        )
        parts.append(f'<text x="0" y="33">{spans}</text>')
    return _svg(WIDTH, height, parts, title)


def scatter(points: np.ndarray, groups: Sequence[str | None], colours: Mapping[str, str], height: int = 330) -> Markup:
    """A map without axes, filled: points [N, 2] and a group name each; None (unlabelled) is small, grey and behind."""
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (np.array([WIDTH, height]) - 24) / np.maximum(high - low, 1e-9)
    xy = (points - (low + high) / 2) * scale + np.array([WIDTH / 2, height / 2])
    parts = ['<rect x=".5" y=".5" width="359" height="' + str(height - 1) + '" rx="8" class="axis"/>']
    for n in sorted(range(len(xy)), key=lambda n: groups[n] is not None):
        name = groups[n]
        look = f'fill="{GREY}" fill-opacity=".45"' if name is None else f'fill="{colours[name]}" fill-opacity=".8"'
        tip = "" if name is None else f"<title>{escape(name)}</title>"
        parts.append(
            f'<circle cx="{xy[n, 0]:.1f}" cy="{xy[n, 1]:.1f}" r="{2 if name is None else 2.8}" {look}>{tip}</circle>'
        )
    return _svg(WIDTH, height, parts, "map of the embeddings")


def legend(colours: Mapping[str, str]) -> Markup:
    """Names with their colours, as a line of HTML for a caption: it keeps its size when the figure shrinks."""
    dot = '<span style="white-space:nowrap;margin-right:12px"><span style="color:{}">●</span> {}</span> '
    return Markup("".join(dot.format(colour, escape(name)) for name, colour in colours.items()))


def palette(names: Iterable[str]) -> dict[str, str]:
    """A colour for every name, in the order given."""
    names = list(names)
    return dict(zip(names, _cycle(len(names)), strict=True))


def heat_map(matrix: np.ndarray, names: Sequence[str], title: str = "") -> Markup:
    """Similarities [K, K] in [-1, 1]: blue agrees, orange opposes, pale is nothing. Every cell has a tooltip."""
    count = len(names)
    left, top = 96, 28
    cell = (WIDTH - left - 2) / max(count, 1)
    parts = [_heading(title)]
    size = min(12.0, cell * 0.95)
    short = _told_apart(names, int((left - 6) / (0.58 * size)))  # a letter is about so wide
    for i, name in enumerate(names):
        y = top + (i + 0.5) * cell
        look = f'text-anchor="end" style="font-size:{size:.1f}px"'
        parts.append(
            f'<text x="{left - 6}" y="{y + size / 3:.1f}" {look}>{escape(short[i])}<title>{escape(name)}</title></text>'
        )
        for j in range(count):
            value = round(float(matrix[i, j]), 2) + 0.0  # + 0.0: no -0
            colour, strength = (COLOURS[0] if value >= 0 else COLOURS[1]), min(abs(value), 1.0)
            x, side = left + j * cell, cell - 1
            tip = f"<title>{escape(name)} / {escape(names[j])}: {value:.2f}</title>"
            look = f'width="{side:.1f}" height="{side:.1f}" fill="{colour}" fill-opacity="{strength:.2f}"'
            parts.append(f'<rect x="{x:.1f}" y="{y - cell / 2:.1f}" {look}>{tip}</rect>')
            if cell >= 30:
                ink = ' style="fill:#fff"' if strength > 0.6 else ""
                parts.append(
                    f'<text x="{x + cell / 2:.1f}" y="{y + 4:.1f}" text-anchor="middle"{ink}>{value:.2f}</text>'
                )
    return _svg(WIDTH, top + count * cell, parts, title)


def intervals(rows: Sequence[tuple[str, float, float, float]], title: str = "") -> Markup:
    """Values with their intervals, one a line: (name, value, low, high). NaN ends draw the point alone.

    Where differences lie on both sides of 0, a line marks it.
    """
    ends = [x for _, *row in rows for x in row if math.isfinite(x)] or [0.0, 1.0]
    ticks = _ticks(min(ends), max(ends), 4)
    low, high = min(*ends, ticks[0]), max(*ends, ticks[-1])
    left, right, step, top = 140, WIDTH - 54, 26, 30
    short = _told_apart([name for name, *_ in rows], 20)
    bottom = top + step * len(rows)

    def at(value: float) -> float:
        return left + (value - low) / ((high - low) or 1.0) * (right - left)

    parts = [_heading(title)]
    for value in ticks:
        parts.append(f'<path class="axis" d="M{at(value):.1f} {top}V{bottom}"/>')
        parts.append(f'<text x="{at(value):.1f}" y="{bottom + 16}" text-anchor="middle">{_short(value)}</text>')
    if low < 0 < high:
        parts.append(f'<path d="M{at(0):.1f} {top}V{bottom}" stroke="{GREY}" fill="none"/>')
    for n, (name, value, lower, upper) in enumerate(rows):
        y = top + (n + 0.5) * step
        parts.append(f'<text x="0" y="{y + 4:.1f}" class="ink">{escape(short[n])}<title>{escape(name)}</title></text>')
        if math.isfinite(lower) and math.isfinite(upper):
            parts.append(_line(f"{at(lower):.1f},{y:.1f} {at(upper):.1f},{y:.1f}", COLOURS[0], 3, 0.45))
        if math.isfinite(value):
            parts.append(f'<circle cx="{at(value):.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[0]}"/>')
        text = f"{value:.3f}" if math.isfinite(value) and max(map(abs, ends)) < 10 else _short(value)
        parts.append(f'<text x="{WIDTH}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    return _svg(WIDTH, bottom + 22, parts, title)


def _svg(width: float, height: float, parts: Iterable[str], label: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _heading(title: str) -> str:
    return f'<text x="0" y="14" class="ink" style="font-weight:600;font-size:14px">{escape(title)}</text>'


def _line(points: str, colour: str, width: float, opacity: float) -> str:
    look = f'stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}" stroke-linejoin="round"'
    return f'<polyline points="{points}" fill="none" {look} stroke-linecap="round"/>'


def _cycle(count: int) -> list[str]:
    """Colours by rank; beyond the palette, hues turned by the golden angle so that neighbours differ."""
    return [COLOURS[i] if i < len(COLOURS) else f"hsl({i * 137.5 % 360:.0f} 50% 55%)" for i in range(count)]


def _clip(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _told_apart(names: Sequence[str], letters: int) -> list[str]:
    """Names cut to so many letters: at their ends, or at their beginnings where the ends tell them apart."""
    cut = [_clip(name, letters) for name in names]
    if len(set(cut)) == len(set(names)):
        return cut
    return [name if len(name) <= letters else f"…{name[1 - letters :]}" for name in names]


def _finite(points: Points) -> np.ndarray:
    """[N, 2], without the points that are not finite."""
    array = np.asarray([(x, y) for x, y in points if y is not None], dtype=float).reshape(-1, 2)
    return array[np.isfinite(array).all(axis=1)]


def _smooth(points: np.ndarray) -> np.ndarray:
    """A long noisy curve as its centred running mean over a thirtieth of it; any other as it is."""
    climbed = np.abs(np.diff(points[:, 1])).sum()
    if len(points) < 40 or climbed <= 3 * np.ptp(points[:, 1]):
        return points
    half = max(2, len(points) // 60)
    window = np.ones(2 * half + 1)
    total, count = (np.convolve(y, window, "same") for y in (points[:, 1], np.ones(len(points))))
    return np.stack([points[:, 0], total / count], axis=1)


def _thin(points: np.ndarray, most: int = 240) -> np.ndarray:
    return points if len(points) <= most else points[np.linspace(0, len(points) - 1, most).round().astype(int)]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round values (1, 2, 5 x 10^n) from just below `low` to just above `high`."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """As short as they can be while they differ."""
    texts = [_short(value) for value in ticks]
    return texts if len(set(texts)) == len(texts) else [f"{value:.6g}" for value in ticks]


def _short(value: float) -> str:
    """A number as an axis wants it: 12k, 3.4, 0.05, 2e-4."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size and size < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.4g}" if size >= 100 or 0.99 < size < 1 else f"{value:.3g}"
