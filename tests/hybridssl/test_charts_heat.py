"""The heat table: every value and name is there, the colour follows the value, and like names stay apart."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np

from hybridssl.charts_heat import heat_table


def test_values_colours_and_names():
    values = np.array([[0.0, 0.5, np.nan], [1.0, -0.001, 2.0]])
    svg = heat_table(values, ["<a>", "b"], ["vidir_molemax_old", "vidir_molemax_new", "x"], "T")
    ET.fromstring(svg)
    texts = re.findall(r"<text[^>]*>([^<]*)", svg)
    assert texts[0] == "T"
    assert "&lt;a&gt;" in texts
    assert [t for t in texts if t.endswith(("_old", "_new"))], "cut where the ends tell them apart"
    assert len(set(texts[1:4])) == 3
    cells = re.findall(r'fill-opacity="([0-9.]+)"><title>([^<]*)</title>', svg)
    strength = {name: float(opacity) for opacity, name in cells}
    assert strength["b, x: 2.000"] == strength["b, vidir_molemax_old: 1.000"] == 1
    assert strength["&lt;a&gt;, vidir_molemax_old: 0.000"] < 0.1 < strength["&lt;a&gt;, vidir_molemax_new: 0.500"] < 0.6
    assert strength["&lt;a&gt;, x: not judged"] < 0.1
    assert [t for t in texts if t in ("–", ".00", "-.00")] == [".00", "–", ".00"]
