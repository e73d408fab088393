"""Columns of the samples of an index by name: what a table said of every image (domain, sex, age, scanner ...).

The index maps what training needs; the free columns lie in each sample's `json`. They are read once a process.
"""

from __future__ import annotations

import difflib
from functools import lru_cache

import numpy as np
from rich.progress import track

from hybridssl.errors import UserError
from shards.cells import free
from shards.index import Index
from shards.terminal import Terminal

SPECIAL = ("source", "label", "group", "split")  # known to every index, whatever its table held


def meta_column(index: Index, numbers: np.ndarray, name: str) -> np.ndarray:
    """str [N]: the column `name` of the samples `numbers`, "" where a sample has no value.

    SPECIAL names come from the index itself (several labels joined by `|`), and win over a free column of that name.
    UserError that lists the columns when none of these samples has the column; DataError when a sample cannot be read.
    """
    numbers = np.asarray(numbers, dtype=np.int64)
    if name in ("source", "split"):  # mapped: no shard need be read
        words = index.splits if name == "split" else (*index.sources, "")  # source -1, none, is the last
        return np.array(words, dtype=str)[index.column(name)[numbers]]
    rows = _rows(index, numbers.tobytes())
    if name not in SPECIAL and not any(name in row for row in rows):
        known = list(dict.fromkeys([*SPECIAL, *sorted({key for row in rows for key in row})]))
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"did you mean '{near[0]}'? It" if near else "it"
        raise UserError(f"no image of {index.root} has a column '{name}'; {hint} has {', '.join(known)}")
    return np.array([row.get(name, "") for row in rows], dtype=str)


@lru_cache(maxsize=4)
def _rows(index: Index, numbers: bytes) -> list[dict[str, str]]:
    """The free columns and SPECIAL names of samples, as text; values that are missing or null are left out."""
    wanted = np.frombuffer(numbers, dtype=np.int64).tolist()
    rows = []
    for number in track(wanted, "columns of the table", console=Terminal(stderr=True), transient=True):
        sample = index.read(number)
        row = {str(key): free(value) for key, value in sample.meta.items() if value is not None}
        special = (sample.source, "|".join(sample.labels), sample.group, sample.split)
        rows.append(row | dict(zip(SPECIAL, special, strict=True)))
    return rows
