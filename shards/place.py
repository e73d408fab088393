"""The folder that a build fills: beside its place until it is whole, and never over files that are not ours."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from shards.errors import DataError
from shards.format import FORMAT
from shards.index import Index

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
    partial = partial_of(out)
    if partial.exists() and not _only_ours(partial):
        raise DataError(f"{partial} is in the way and not ours to delete: move it elsewhere")
    partial.mkdir(parents=True, exist_ok=True)
    return partial


def finish(out: Path) -> None:
    """Put the filled folder in its place; what was there goes last."""
    out = out.absolute()
    old, mine = out.with_name(out.name + ".old.partial"), out / "classes.csv"
    if mine.is_file() and not (partial_of(out) / mine.name).exists():  # written by hand: no build makes one of images
        shutil.copy2(mine, partial_of(out))
    if out.exists():
        os.replace(out, old)
    os.replace(partial_of(out), out)
    shutil.rmtree(old, ignore_errors=True)


def is_index(folder: Path) -> bool:
    try:
        return json.loads((folder / "index.json").read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if not is_index(out):
        raise DataError(f"{out} exists and holds no index of shards: choose another --out, nothing was touched")
    if not overwrite:
        raise DataError(f"{out} already holds an index: add --overwrite to replace it, or choose another --out")
    if Index.open(out).header.get("in_place") or not _only_ours(out):
        raise DataError(f"{out} holds files that `build` did not write, so it is not replaced: choose another --out")


def _only_ours(folder: Path) -> bool:
    return folder.is_dir() and all(OURS.fullmatch(path.name) for path in folder.iterdir())
