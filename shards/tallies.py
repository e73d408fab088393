"""What a set consists of: classes by split and source, the free columns, the sizes of its images."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from shards.cells import free
from shards.errors import DataError
from shards.index import Index
from shards.looks import Looks
from shards.stats import cross

SHOWN = 20  # values of a column, and sizes, that are listed; the rest is counted
IDENTIFIERS = 0.5  # share of distinct values from which a column names images rather than describes them

Array = np.ndarray


def tallies(index: Index, looks: Looks, meta: dict[str, list[str]]) -> dict[str, Any]:
    """Counts, ready for JSON. meta: as `columns` gives it."""
    split, label, source = (np.asarray(index.column(name)) for name in ("split", "label", "source"))
    return {
        "classes": cross(label, index.classes, split, index.splits),
        "sources": cross(source, index.sources, label, (*index.classes, "")),
        "splits": cross(split, index.splits, label, (*index.classes, "")),
        "meta": {name: _column(values) for name, values in meta.items()},
        "sizes": _sizes(looks.size[looks.readable]),
    }


def columns(index: Index) -> dict[str, list[str]]:
    """{column: its value in every sample, as text} of the free columns; "" where there is none."""
    table: dict[str, list[str]] = {}
    for i in range(len(index)):
        try:
            row = index.meta(i)
        except DataError:
            continue
        for name, value in row.items():
            if isinstance(value, str | int | float) and (text := free(value)):
                if name not in table:
                    table[name] = [""] * len(index)
                table[name][i] = text
    return dict(sorted(table.items()))


def _column(values: list[str]) -> dict[str, Any]:
    """Numbers by their quartiles, words by how often each occurs; what names images is only counted."""
    there = [value for value in values if value]
    counts = Counter(there)
    found: dict[str, Any] = {"missing": len(values) - len(there), "distinct": len(counts)}
    try:
        numbers = np.array([float(value) for value in there])
    except ValueError:
        numbers = np.array([np.nan])
    if np.isfinite(numbers).all() and len(counts) > SHOWN:
        return found | {"quartiles": [float(q) for q in np.percentile(numbers, [0, 25, 50, 75, 100])]}
    if len(counts) > max(SHOWN, IDENTIFIERS * len(there)):
        return found
    return found | {"values": dict(counts.most_common(SHOWN))}


def _sizes(sizes: Array) -> dict[str, Any]:
    """[N, 2] heights and widths: the range of the short sides, and the commonest sizes."""
    if not len(sizes):
        return {}
    short = sizes.min(axis=1)
    common = Counter(f"{width} x {height}" for height, width in sizes.tolist())
    return {
        "short_side": [int(q) for q in np.percentile(short, [0, 25, 50, 75, 100])],
        "distinct": len(common),
        "common": dict(common.most_common(SHOWN)),
    }
