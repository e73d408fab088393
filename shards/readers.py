"""Which module reads which file. Photographs are read by sources.py; for another format one file is added beside this
one, and its name below. It holds

    SUFFIXES                       how such files are called: small letters, with the dot
    is_mine(head) -> bool          whether a file is one, from its first 132 bytes, whatever it is called
    read(data, options) -> Opened  the frames in a file's bytes, and what they say of the patient. Raises DataError
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from shards.sources import SUFFIXES

READERS = [
    "dicom",
]
HEAD = 132  # bytes that tell what a file is


def of_file(path: Path) -> Any | None:
    """The module that reads a file; None: a photograph, or no image. Only a file whose name does not tell is opened:
    DICOM files often have no suffix, or the end of a UID for one."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return None
    named = of(b"", suffix)
    if named or suffix[1:].isalpha():
        return named
    try:
        with path.open("rb") as file:
            return of(file.read(HEAD), "")
    except OSError:
        return None


def of(head: bytes, suffix: str) -> Any | None:
    """The module that reads a file with these first bytes, or with this suffix."""
    modules = [import_module(f"shards.{name}") for name in READERS]
    return next((m for m in modules if suffix.lower() in m.SUFFIXES or m.is_mine(head[:HEAD])), None)


def suffixes() -> tuple[str, ...]:
    return tuple(s for name in READERS for s in import_module(f"shards.{name}").SUFFIXES)
