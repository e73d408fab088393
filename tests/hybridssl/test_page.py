"""A page escapes what comes from data, needs nothing from outside, and its charts show what they are given."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from hybridssl import charts
from hybridssl.charts_bands import band_chart
from hybridssl.page import Markup, Page, inline

EVIL = "\"><script>alert(1)</script>&'"
PNG = cv2.imencode(".png", np.zeros((2, 2, 3), np.uint8))[1].tobytes()
LINE = [(0.0, 1.0), (1.0, 2.0)]

ENTRIES: dict[str, Callable[[Page], Page]] = {
    "title": lambda page: setattr(page, "title", EVIL) or page,
    "subtitle": lambda page: setattr(page, "subtitle", EVIL) or page,
    "section": lambda page: page.section(EVIL, EVIL),
    "text": lambda page: page.text(EVIL),
    "answer": lambda page: page.answer(EVIL),
    "note": lambda page: page.note(EVIL, EVIL),
    "facts": lambda page: page.facts([(EVIL, EVIL)]),
    "table": lambda page: page.table([EVIL], [[EVIL]], EVIL),
    "figure": lambda page: page.figure(PNG, EVIL),
    "figures": lambda page: page.figures([(PNG, EVIL)]),
    "images": lambda page: page.images([[(PNG, EVIL)]], [EVIL]),
    "line_chart": lambda page: page.figure(
        charts.line_chart({EVIL: LINE, "b": LINE}, EVIL, reference={EVIL: 1.0}, x_label=EVIL)
    ),
    "scatter": lambda page: page.figure(charts.scatter(np.eye(2), [EVIL, None], {EVIL: "red"})),
    "legend": lambda page: page.text(charts.legend({EVIL: "red"})),
    "heat_map": lambda page: page.figure(charts.heat_map(np.eye(2), [EVIL, EVIL], EVIL)),
    "intervals": lambda page: page.figure(charts.intervals([(EVIL, 0.5, 0.4, 0.6)], EVIL)),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_markup_in_the_data_stays_text(entry: str) -> None:
    html = ENTRIES[entry](Page("page")).render()
    assert "alert(1)" in html
    assert "<script" not in html.lower()
    assert EVIL not in html


def test_nothing_comes_from_outside() -> None:
    page = Page("page", "subtitle")
    for entry in ENTRIES.values():
        entry(page)
    html = page.render()
    assert not re.search(r"https?:|//[a-z]|@import|<link|<iframe", html)
    assert all(address.startswith(("data:image/", "#")) for address in re.findall(r'(?:src|href)="([^"]*)', html))
    assert "default-src 'none'" in html


def test_a_string_is_no_figure() -> None:
    with pytest.raises(TypeError, match="not str"):
        Page("page").figure("<svg></svg>")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not bytes"):
        Page("page").figure(b"<svg></svg>")


def test_numbers_are_made_readable() -> None:
    values = [1234567, 0.123456, True, None, float("nan"), "<", Markup("<b>")]
    assert [inline(v) for v in values] == ["1,234,567", "0.1235", "True", "–", "–", "&lt;", "<b>"]


def test_table_sets_numbers_flush_right_and_the_best_in_bold() -> None:
    html = Page("page").table(["name", "value"], [["a", 0.5], ["b", ".43 [.41, .45]"]], strong=[(1, 1)]).render()
    assert '<th class="n">value</th>' in html
    assert '<td class="n">0.5</td>' in html
    assert '<td class="n b">.43 [.41, .45]</td>' in html
    assert '<td class="">a</td>' in html


def test_words_that_name_a_row_stand_on_the_left_and_dense_tables_set_intervals_below() -> None:
    html = Page("page").table(["", "value"], [["5 masks", 0.5], ["20 masks", 0.25]]).render()
    assert '<td class="">5 masks</td>' in html
    assert "<table>" in html
    assert '<td class="n">5</td>' in Page("page").table(["k", "value"], [[5, "x"]]).render()
    assert '<table class="dense">' in Page("page").table(list("abcdefg"), []).render()
    html = Page("page").table(["", "verdict"], [["", "not shown to be better"]]).render()
    assert '<td class="t">not shown to be better</td>' in html


def test_a_page_with_pictures_says_that_it_is_confidential() -> None:
    assert "as confidential as they are" in Page("page").figure(PNG).render()
    assert "as confidential as they are" not in Page("page").figure(charts.line_chart({"a": LINE})).render()


def test_write_replaces_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    assert Page("first").write(path) == path
    monkeypatch.setattr(Page, "render", lambda self: "\ud800")  # cannot be encoded: the write breaks half way
    with pytest.raises(UnicodeEncodeError):
        Page("second").write(path)
    assert "first" in path.read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8").endswith("</html>\n")


def polylines(svg: str) -> list[np.ndarray]:
    found = re.findall(r'<polyline points="([^"]+)"', svg)
    return [np.array([[float(v) for v in p.split(",")] for p in points.split()]) for points in found]


def test_line_chart_puts_values_where_they_belong() -> None:
    (curve,) = polylines(charts.line_chart({"a": [(0, 0.0), (5, 5.0), (10, 10.0)]}))
    assert curve[1] == pytest.approx((curve[0] + curve[2]) / 2, abs=0.1)
    assert curve[2, 1] < curve[0, 1]  # up is more


def words(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>(?:<tspan.*</tspan>)?([^<]*)", svg)


def test_line_chart_tells_the_last_value_only_of_a_course() -> None:
    curve = {"a": [(0, 0.5), (100, 0.956)]}
    assert "0.956" in words(charts.line_chart(curve, "A"))
    assert "0.956" not in words(charts.line_chart(curve, "A", final=False))
    assert "b 0.956" in words(charts.line_chart({**curve, "b": curve["a"]}))
    assert "b " in words(charts.line_chart({**curve, "b": curve["a"]}, final=False))


def test_intervals_have_equal_decimals_a_line_at_zero_and_names_that_stay_apart() -> None:
    rows = [("models/a-long-name-step-1000", 0.38, -0.1, 0.4), ("models/a-long-name-step-2000", -0.0243, -0.2, 0.1)]
    svg = charts.intervals(rows, "Difference")
    assert {"0.380", "-0.024"} <= set(words(svg))
    assert len({w for w in words(svg) if w.startswith("…")}) == 2
    assert f'stroke="{charts.GREY}"' in svg
    assert f'stroke="{charts.GREY}"' not in charts.intervals([("a", 0.38, 0.1, 0.4)])
    assert "12,345" not in words(charts.intervals([("a", 12345.0, 1.0, 20000.0)]))


def test_line_chart_leaves_out_what_is_not_finite() -> None:
    (curve,) = polylines(charts.line_chart({"a": [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 2.0)]}))
    assert len(curve) == 2
    with pytest.raises(ValueError, match="finite"):
        charts.line_chart({"a": [(0, float("nan"))]})


def test_line_chart_smooths_noise_and_nothing_else() -> None:
    steps, rng = np.arange(400), np.random.default_rng(0)
    straight = charts.line_chart({"a": list(zip(steps, steps / 400, strict=True))})
    noisy = charts.line_chart({"a": list(zip(steps, rng.normal(size=400), strict=True))})
    assert len(polylines(straight)) == 1
    behind, front = polylines(noisy)
    assert np.ptp(front[:, 1]) < 0.5 * np.ptp(behind[:, 1])
    assert "<circle" in charts.line_chart({"a": [(3, 1.0)]})  # one point is a dot


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (5, 5), (-3, 7), (1e-7, 3e-7), (0.99, 1.0), (2, 900_000), (1.004, 1.016)]
)
def test_ticks_are_few_and_hold_the_data(low: float, high: float) -> None:
    (curve,) = polylines(charts.line_chart({"a": [(0, low), (1, high)]}, height=200))
    assert curve[:, 1].min() >= 45
    assert curve[:, 1].max() <= 177
    ticks = charts._ticks(low, high, 4)
    assert 3 <= len(ticks) <= 7
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert len(set(charts._tick_texts(ticks))) == len(ticks)


def test_names_beside_a_heat_map_fit_and_differ() -> None:
    svg = charts.heat_map(np.array([[1, -0.001], [-0.001, 1]]), ["Seltene Krankheit A", "Seltene Krankheit B"])
    names = re.findall(r'text-anchor="end"[^>]*>([^<]*)<title>', svg)
    assert len(set(names)) == 2
    assert all(len(name) <= 12 for name in names)
    assert ">0.00<" in svg
    assert "-0.00" not in svg


def test_bands_lie_on_an_axis_of_even_or_of_logarithmic_steps() -> None:
    def across(xs: list[float], log: bool) -> list[float]:
        svg = band_chart({"a": [(x, 0.5, 0.4, 0.6) for x in xs]}, log=log)
        return [float(x) for x in re.findall(r'<circle cx="([0-9.]+)"', svg)]

    even, logarithmic = across([0, 1, 2], False), across([1, 10, 100], True)
    assert even == pytest.approx(logarithmic)
    assert even[1] == pytest.approx((even[0] + even[2]) / 2, abs=0.1)


def test_a_point_without_a_band_tells_its_value_alone() -> None:
    svg = band_chart({"a": [(1, 0.5, 0.4, 0.6), (2, 0.75, math.nan, math.nan)]})
    assert "a, 1: 0.500 [0.400, 0.600]<" in svg
    assert "a, 2: 0.750<" in svg
    assert "nan" not in svg


def test_palette_has_a_colour_of_its_own_for_every_name() -> None:
    assert len(set(charts.palette(map(str, range(40))).values())) == 40
