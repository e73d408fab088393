"""What a cell says, of a table or of a sample's json: nothing, or a text, with one spelling for a whole number.

Programs write a column of numbers with gaps as fractions (3.0) and NaN. Taken by the letter, one patient would have two
names, and all unknown patients one.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

from shards.errors import DataError

_NAN = ("nan", "NaN")  # as numpy, pandas and polars write it; Nan is a name


def cell(value: Any, what: str) -> str:
    """A value from JSON as text; "": None, "" and NaN. DataError, about `what`, for what is neither text nor whole."""
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return value
    if type(value) is int or (type(value) is float and value.is_integer()):
        return str(int(value))
    raise DataError(f"{what} is {reprlib.repr(value)}: make it a text or a whole number, or leave it out")


def free(value: Any) -> str:
    """A value of a free column as text: as `cell`, but whatever else is there is written out."""
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def labels_of(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The labels in a `json` member: a cell, or a list of them. DataError, about the sample `where`, as for `cell`."""
    value = row.get("label")
    values = value if isinstance(value, list) else [value]
    return tuple(text for part in values if (text := cell(part, f"{where}: its label")))


def there(text: str) -> str:
    """A cell of CSV; NaN is nothing."""
    return "" if text in _NAN else text


def whole(text: str) -> str:
    """A name from a table: 3.0 is 3."""
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else text
