"""Slices in files of their own become one row: the channels of one image, in the order in which they lie in space.

What belongs together, `--slices` says: the series of DICOM files, the folder, or a column of the table.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from shards import dicom, readers
from shards.dicom import Place
from shards.errors import DataError
from shards.table import Row, nearest

_ROLES = ("labels", "source", "group", "split", "text", "mask")


def stacked(rows: list[Row], by: str, private: bool = False) -> list[Row]:
    """One row for all files of a series, a folder, or a value of the column `by` (in one group of one source).

    Each has its files in `slices`: DICOM by position (feet to head, in axial slices), else by instance number, and
    other pictures by the numbers in their names. A file that belongs to none is alone. DataError when nothing in
    `rows` can be told apart by `by`, and for slices of one image that the table calls different things. `private`: no
    error repeats a name.
    """
    places = {row.name: dicom.place(row.image) for row in rows if readers.of_file(row.image) is dicom}
    if by == "series" and not any(place.series for place in places.values()):
        raise DataError("--slices series: no DICOM file here names its series; name a column of the table, or folder")
    if by not in ("series", "folder") and not any(by in row.meta for row in rows):
        have = sorted({name for row in rows for name in row.meta})
        raise DataError(f"--slices {by}: the table has no such column (or write series, or folder){nearest(by, have)}")
    images: dict[Hashable, list[Row]] = defaultdict(list)
    for row in rows:
        images[_image(row, by, places)].append(row)
    return [_merged(_in_order(slices, places), private) for slices in images.values()]


def _image(row: Row, by: str, places: dict[str, Place]) -> Hashable:
    """What all slices of an image have in common."""
    if by == "folder":
        return str(PurePosixPath(row.name).parent)
    if by == "series":
        series = places[row.name].series if row.name in places else ""
        return series or (row.name,)
    return (row.source, row.group, row.meta[by]) if row.meta.get(by) else (row.name,)


def _in_order(rows: list[Row], places: dict[str, Place]) -> list[Row]:
    found = [places.get(row.name, Place()) for row in rows]
    by_depth, by_number = (all(getattr(p, name) is not None for p in found) for name in ("depth", "number"))

    def at(pair: tuple[Row, Place]) -> tuple[Any, ...]:
        row, place = pair
        return place.depth if by_depth else 0, place.number if by_number else 0, _natural(row.name), row.name

    return [row for row, _ in sorted(zip(rows, found, strict=True), key=at)]


def _natural(name: str) -> list[tuple[int, str]]:
    """slice9 before slice10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _merged(rows: list[Row], private: bool) -> Row:
    said: dict[str, Any] = {}
    for role in _ROLES:
        values = sorted({getattr(row, role) for row in rows if getattr(row, role)})
        if len(values) > 1:
            which = "one image" if private else rows[0].name
            raise DataError(
                f"the {len(rows)} slices of {which} have {len(values)} different {role}: an image has one, so give all "
                "of them the same (empty cells do not count), or stack them --slices by something else"
            )
        if values:
            said[role] = values[0]
    meta = {name: value for name, value in rows[0].meta.items() if all(row.meta.get(name) == value for row in rows)}
    return replace(rows[0], **said, meta=meta, slices=tuple(row.image for row in rows))
