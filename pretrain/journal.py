"""Files of one JSON object a line, appended to by a run that a full disk must not end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hybridssl.files import write_text


class Journal:
    """Appends objects to `path`; what the disk refuses is kept and written with the next one."""

    def __init__(self, path: Path) -> None:
        self.path, self._waiting = path, ""

    def add(self, line: Mapping[str, Any]) -> str | None:
        """Returns what went wrong, if it did."""
        self._waiting += json.dumps(line, ensure_ascii=False) + "\n"
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self._waiting)
        except OSError as error:
            if self.path.is_file():  # perhaps a part of it was written
                with open(self.path, "r+b") as file:
                    file.truncate(size)
            return f"{self.path} could not be written ({error})"
        self._waiting = ""
        return None

    def lines(self) -> Iterator[dict[str, Any]]:
        """What is there; the last line of a killed run may be half a one, and is left out."""
        if self.path.is_file():
            for text in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    continue
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    yield line

    def cut(self, step: int) -> list[dict[str, Any]]:
        """Drop lines after `step`, which a resumed run writes again; returns those that stay."""
        kept = [line for line in self.lines() if line["step"] <= step]
        if self.path.is_file():
            write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        return kept
