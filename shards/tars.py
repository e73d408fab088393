"""Writing one WebDataset tar."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Dicts of `__key__` and members (extension -> bytes). Nothing in the tar depends on the moment; it is synced."""
    from webdataset.writer import TarWriter  # it imports torch, and not every verb needs seconds to start

    with path.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0.0, user="", group="") as writer:
            for sample in samples:
                writer.write(sample)
        file.flush()
        os.fsync(file.fileno())
