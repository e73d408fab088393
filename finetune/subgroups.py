"""Subgroups of images by a column of the table: values as they are, numbers in bins, values merged.

--by sex · --by age --bins 0 30 60 200 · --by fitspatrick --merge "I-II=1,2" "III-VI=3,4,5,6"
"""

from __future__ import annotations

import argparse

import numpy as np

from finetune.columns import meta_column
from hybridssl.errors import UserError
from shards.index import Index

Array = np.ndarray
UNKNOWN = "(unknown)"
MOST = 20  # distinct values beyond which a column of numbers wants bins


def add_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    add = parser.add_argument
    add("--by", required=required, metavar="COLUMN", help="meta column that says the subgroup: sex, age, site, ...")
    add(
        "--bins",
        nargs="+",
        type=float,
        metavar="X",
        help="edges for a column of numbers: 0 30 60 200 makes [0, 30), ...",
    )
    add("--merge", nargs="+", default=[], metavar="NAME=A,B", help="values that count as one: I-II=1,2 III-VI=3,4,5,6")


def of_images(index: Index, numbers: Array, args: argparse.Namespace) -> Array:
    """str [N]: the subgroup of each image by --by, --bins and --merge; UNKNOWN where the column says nothing."""
    return subgroup(meta_column(index, numbers, args.by), args.by, args.bins, args.merge)


def subgroup(values: Array, column: str, bins: list[float] | None = None, merges: list[str] | None = None) -> Array:
    """values: str [N] as in the table. UserError when they do not fit bins or merges, or need bins."""
    values = np.array([_tidy(str(v)) for v in values], dtype=object)
    known = values != UNKNOWN
    if bins:
        values = _binned(values, known, column, bins)
    elif len(set(values[known])) > MOST and all(_number(v) is not None for v in values[known]):
        raise UserError(f"--by {column}: {len(set(values[known]))} different numbers; say --bins, such as 0 30 60 200")
    values = _merged(values, column, merges or [])
    if len(set(values) - {UNKNOWN}) < 2:
        only = ", ".join(sorted(set(values)))
        raise UserError(f"--by {column}: all test images are of one subgroup ({only}): there is nothing to compare")
    return values.astype(str)


def names(values: Array) -> list[str]:
    """The subgroups in reading order: numbers and bins by size, words by letters, the unknown last."""

    def rank(name: str) -> tuple[bool, float, str]:
        number = _number(name.split(" to ")[0])
        return name == UNKNOWN, np.inf if number is None else number, name

    return sorted(set(values.tolist()), key=rank)


def _binned(values: Array, known: Array, column: str, bins: list[float]) -> Array:
    if len(bins) < 2 or sorted(set(bins)) != bins:
        raise UserError(f"--bins {' '.join(f'{b:g}' for b in bins)}: at least two edges, each above the one before")
    out = np.full(len(values), UNKNOWN, dtype=object)
    for n in np.flatnonzero(known):
        number = _number(values[n])
        if number is None:
            raise UserError(f"--by {column}: '{values[n]}' is not a number, so --bins does not fit; use --merge")
        if not bins[0] <= number <= bins[-1]:
            raise UserError(f"--by {column}: {values[n]} lies outside --bins {bins[0]:g} ... {bins[-1]:g}: widen them")
        at = min(int(np.searchsorted(bins, number, side="right")), len(bins) - 1)  # the last edge is in the last bin
        out[n] = f"{bins[at - 1]:g} to {'' if at == len(bins) - 1 else '<'}{bins[at]:g}"
    return out


def _merged(values: Array, column: str, merges: list[str]) -> Array:
    becomes: dict[str, str] = {}
    for rule in merges:
        name, _, members = rule.partition("=")
        for member in (_tidy(m) for m in members.split(",")):
            if not name or member == UNKNOWN:
                raise UserError(f"--merge '{rule}' is not NAME=VALUE,VALUE")
            if member in becomes:
                raise UserError(f"--merge puts '{member}' into '{becomes[member]}' and '{name}': choose one")
            if member not in values:
                there = ", ".join(names(values))
                raise UserError(f"--merge: no test image has {column} '{member}'; there are {there}")
            becomes[member] = name
    return np.array([becomes.get(v, v) for v in values], dtype=object)


def _tidy(value: str) -> str:
    """One spelling a value: 2 and 2.0 are the same skin type; what stands for nothing is UNKNOWN."""
    value = value.strip()
    if value.lower() in ("", "nan", "none", "null", "unknown", "na", "n/a"):
        return UNKNOWN
    number = _number(value)
    return value if number is None else f"{number:g}"


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if np.isfinite(number) else None
