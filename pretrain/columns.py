"""Columns of the table that objectives read: their values, looked up once, and the numbers that stand for them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from hybridssl.errors import UserError
from hybridssl.types import Column
from pretrain.reach import within_reach
from pretrain.recipe import Recipe
from shards.errors import DataError
from shards.index import Index

LOOKED_AT = 100_000  # images, evenly spread: a value that none of them has counts as missing
FEW = 10  # up to so many different numbers are taken for classes: a grade, a skin type
MOST = 1000  # classes; a column of more is a name for each image or patient


def columns(recipe: Recipe, index: Index) -> tuple[Column, ...]:
    """What the objectives of `recipe` want, in the order of `Batch.meta`. UserError for a column that will not do."""
    wanted: dict[str, str] = {}
    for options in recipe.objectives.values():
        wanted |= options.table_columns if options.weight else {}
    return _columns(index, recipe.data.splits, tuple(wanted.items()))


def encode(wanted: Iterable[Column], meta: Mapping[str, Any], source: str) -> tuple[float, ...]:
    """The row of `Batch.meta` for one sample."""
    return tuple(column.encode(_cell(meta, source, column.name)) for column in wanted)


@lru_cache(maxsize=4)  # the model and the loader both ask
def _columns(index: Index, splits: tuple[str, ...], wanted: tuple[tuple[str, str], ...]) -> tuple[Column, ...]:
    if not wanted:
        return ()
    # What a run learns to guess must be the same when it goes on where the cache is another.
    numbers = within_reach(index, index.select(splits), of_the_cache=False)
    if len(numbers) > LOOKED_AT:
        numbers = numbers[np.linspace(0, len(numbers) - 1, LOOKED_AT).astype(int)]
    rows = list(_rows(index, numbers))
    return tuple(_column(index, name, kind, rows) for name, kind in wanted)


def _rows(index: Index, numbers: np.ndarray) -> Iterable[dict[str, Any]]:
    sources = (*index.sources, "")
    for number, source in zip(numbers.tolist(), index.column("source")[numbers].tolist(), strict=True):
        try:
            meta = index.meta(number)
        except DataError:  # the stream will name it
            continue
        yield {**meta, "source": sources[source]}


def _column(index: Index, name: str, kind: str, rows: list[dict[str, Any]]) -> Column:
    values = [value for row in rows if (value := _cell(row, row["source"], name)) is not None]
    if not values:
        known = sorted({key for row in rows for key, value in row.items() if value not in (None, "")})
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"no image of {index} has a column '{name}'{hint} It has {', '.join(known) or 'none'}")
    numbers = [_number(value) for value in values]
    names = tuple(sorted({str(value) for value in values}))
    if len(names) == 1:
        raise UserError(f"column '{name}' of {index} is '{names[0]}' throughout and guides nothing: leave it out")
    whole = all(number is not None for number in numbers)
    if kind == "number" or (not kind and whole and len(names) > FEW):
        finite = np.array([n for n in numbers if n is not None and math.isfinite(n)])
        if not len(finite) or not finite.std():
            raise UserError(f"column '{name}' of {index} is not of numbers, such as '{names[0]}': ask for classes")
        return Column(name, mean=float(finite.mean()), std=float(finite.std()))
    if len(names) > MOST:
        raise UserError(
            f"column '{name}' of {index} has {len(names):,} different values, such as '{names[0]}': a guide takes "
            f"numbers, or up to {MOST:,} classes"
        )
    return Column(name, names)


def _cell(meta: Mapping[str, Any], source: str, name: str) -> Any:
    """None when there is no value."""
    value = source if name == "source" else meta.get(name)
    return None if value == "" else value


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
