"""The folder that a build fills: beside its place until it is whole, and never over files that are not ours."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.format import FORMAT

OURS = re.compile(r"(shard-\d+\.(tar|json)|index\.json|index\.safetensors|quarantine\.jsonl|classes\.csv)(\.new)?")


class writing:
    """`with writing(out) as partial`: fill `partial`, and it becomes `out` at the end, or nothing stays on an error."""

    def __init__(self, out: Path, overwrite: bool):
        self.out, self.overwrite = out.absolute(), overwrite

    def __enter__(self) -> Path:
        self.partial = begin(self.out, self.overwrite)
        shutil.rmtree(self.partial)
        self.partial.mkdir()
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        finish(self.out)


def partial_of(out: Path) -> Path:
    out = out.absolute()
    return out.with_name(out.name + ".partial")


def begin(out: Path, overwrite: bool) -> Path:
    """The folder to fill, with what an interrupted build left there. DataError when `out` may not be replaced."""
    if out.exists():
        _check_replaceable(out, overwrite)
        _room(out.absolute())  # before the work: what an earlier build has left there may be what the disk lacks
    partial = partial_of(out)
    if partial.exists() and not _only_ours(partial):
        raise DataError(f"{partial} is in the way and not ours to delete: move it elsewhere")
    partial.mkdir(parents=True, exist_ok=True)
    return partial


def finish(out: Path) -> None:
    """Put the filled folder in its place; what was there goes last."""
    out = out.absolute()
    mine = out / "classes.csv"
    if mine.is_file() and not (partial_of(out) / mine.name).exists():  # written by hand: no build makes one of images
        shutil.copy2(mine, partial_of(out))
    old = _room(out) if out.exists() else None
    if old:
        os.replace(out, old)
    os.replace(partial_of(out), out)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def _room(out: Path) -> Path:
    """Where `out` can go when it is replaced. What an earlier build could not remove there is tried again."""
    old, number = out.with_name(out.name + ".old.partial"), 1
    while _stays(old):
        number += 1
        old = out.with_name(f"{out.name}.old-{number}.partial")
    return old


def _stays(old: Path) -> bool:
    """Is it there, also after an attempt to remove it?"""
    with suppress(OSError):  # it may not be ours to list
        if _only_ours(old) and not any(old.glob("shard-*.json")):  # notes are of a build whose --out is called OUT.old
            shutil.rmtree(old)
    return os.path.lexists(old)


def header_of(folder: Path) -> dict[str, Any] | None:
    """index.json, also of a set that is otherwise damaged; None: there is none of ours."""
    try:
        header = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        return header if header["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    header = header_of(out)
    if header is None:
        raise DataError(f"{out} exists and holds no index of shards: choose another --out, nothing was touched")
    if not overwrite:
        raise DataError(f"{out} already holds an index: add --overwrite to replace it, or choose another --out")
    if header.get("in_place") or not _only_ours(out):
        raise DataError(f"{out} holds files that `build` did not write, so it is not replaced: choose another --out")


def _only_ours(folder: Path) -> bool:
    return folder.is_dir() and all(OURS.fullmatch(path.name) for path in folder.iterdir())
