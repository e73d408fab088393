"""Tables that people open in a spreadsheet: what would run there as a formula is written as text, and read back.

A key, a path or a label comes from files of others. `=HYPERLINK(...)` in a CSV cell is a link, or worse, for whoever
opens it. The usual remedy (OWASP, "CSV injection") is an apostrophe in front, which says: this is text.
"""

from __future__ import annotations

import re

STARTS = tuple("=+-@\t\r\n＝＋－＠")  # how a formula begins; with the wide signs in Japanese
_NUMBER = re.compile(r"[+-]?[0-9]+([.,][0-9]+)?([eE][+-]?[0-9]+)?")


def safe(value: object) -> object:
    """`value` as a spreadsheet may see it; numbers stay numbers. `restored` undoes it."""
    if value is None or isinstance(value, (int, float)):
        return value
    text = str(value)
    return f"'{text}" if _runs(text) else text


def restored(text: str) -> str:
    """What was handed to `safe`, from what it made of it; other text as it is."""
    return text[1:] if text.startswith("'") and _runs(text) else text


def _runs(text: str) -> bool:
    """Whether it is a formula, behind any number of apostrophes: those that are there already must come back."""
    bare = text.lstrip("'")
    return bare.startswith(STARTS) and not _NUMBER.fullmatch(bare)
