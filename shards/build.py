"""A folder of images, and what a table says of them, become tar shards with an index. Same input, same bytes."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from shards import dicom, parts, readers
from shards.audit import FORMAT as AUDIT
from shards.errors import DataError
from shards.format import hash64
from shards.index import Index
from shards.options import BuildOptions
from shards.pack import file_key, key_of
from shards.place import begin, finish, partial_of
from shards.plan import plan
from shards.privacy import Salt, missing_salt
from shards.slices import stacked
from shards.split import parse_split, stratified
from shards.spreadsheet import safe
from shards.table import Row, find_images, from_folders, nearest, read_table

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Left:
    """Of the folder and the table, what is not used."""

    ignored: int = 0  # images that the table does not name
    unread: dict[str, int] = field(default_factory=dict)  # {suffix: number} of pictures in a format that is not read
    splits: int = 0  # images whose own split --split overrides


@dataclass(frozen=True)
class Built:
    """What `build` made."""

    index: Index
    left: Left  # what there was besides
    quarantined: int  # images that do not decode, listed in quarantine.jsonl
    dropped: int = 0  # duplicates, or what an audit calls superfluous


def build(
    images: str | Path,
    out: str | Path,
    table: str | Path | None = None,
    options: BuildOptions | None = None,
    progress: Progress = lambda done, total: None,
) -> Built:
    """Pack a folder (with a table, the images that it names) into `out`. DataError names what to mend.

    Everything is written beside `out` and renamed at the end. What an interrupted build leaves there is used by the
    next one, as far as files, table and options are the same.
    """
    options, out = replace(options or BuildOptions(), part=(1, 1)), Path(out)
    left = build_part(images, out, table, options, progress)
    try:
        return replace(join(out, options.overwrite), left=left)
    except DataError:  # no image can be read, so there is nothing to go on with
        shutil.rmtree(partial_of(out), ignore_errors=True)
        raise


def build_part(
    images: str | Path, out: str | Path, table: str | Path | None, options: BuildOptions, progress: Progress
) -> Left:
    """Write the shards of `options.part`, for `join`. What of the folder and the table is not used."""
    found = find_images(Path(images))
    rows = gather(Path(images), found.images, Path(table) if table is not None else None, options)
    splits = sum(bool(row.split) for row in rows) if options.split else 0
    rows = _stratified(rows, options) if options.stratify else rows
    drop = _audited(options, rows)
    parts.write_part(begin(Path(out), options.overwrite), plan(rows, options, drop), options, drop, progress)
    return Left(len(found.images) - sum(max(1, len(row.slices)) for row in rows), found.unread, splits)


def join(out: str | Path, overwrite: bool = False, progress: Progress = lambda done, total: None) -> Built:
    """Index the parts of a build and put them in their place. DataError when one is missing."""
    partial = begin(Path(out), overwrite)
    try:
        joined = parts.join(Path(out), progress)
    finally:
        if not any(partial.iterdir()):
            partial.rmdir()
    finish(Path(out))
    return Built(Index.open(out), Left(), joined.quarantined, joined.dropped)


def gather(folder: Path, found: dict[str, Path], table: Path | None, options: BuildOptions) -> list[Row]:
    """The rows to pack: what table and folders say, identifiers hashed."""
    foreign = [reader for reader in map(readers.of_file, found.values()) if reader]  # which may name the patients
    if dicom in foreign:
        if not options.salt:
            raise missing_salt(foreign.count(dicom))
        dicom.check_tags(options.tags)
    rows = [Row(path, name) for name, path in found.items()]
    if table is not None:
        rows = read_table(table, folder, found, options.columns, private=bool(options.salt))
    rows = [from_folders(row, options.levels) for row in rows]
    if any(row.labels for row in rows):  # labels belong to a source, whose vocabulary says what it can name
        rows = [replace(row, source=row.source or options.source or "default") for row in rows]
    elif options.source:
        rows = [replace(row, source=row.source or options.source) for row in rows]
    if options.slices:
        rows = stacked(rows, options.slices, private=bool(options.salt))
    rows = _hashed(rows, options)
    if options.split:
        _check_by(rows, options, table, bool(foreign))
    return rows


def write_linkage(path: Path, images: Path, table: Path | None, options: BuildOptions) -> None:
    """A table of paths and keys, for whoever holds the originals: the only way back from a hashed path.

    A path that a spreadsheet would run as a formula has an apostrophe in front (spreadsheet.py).
    """
    found = find_images(images).images
    names = {file: name for name, file in found.items()}
    rows = gather(images, found, table, options)
    keys = {names[file]: key_of(row.name) for row in rows for file in row.slices or (row.image,)}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "key"])
        writer.writerows((safe(path), key) for path, key in sorted(keys.items()))


def _hashed(rows: list[Row], options: BuildOptions) -> list[Row]:
    """With a salt, groups, paths and the column `--by` are stored hashed, whatever they come from."""
    if not options.salt:
        return rows
    salt = Salt(options.salt)
    rows = [replace(row, group=salt.hash("group", row.group)) if row.group else row for row in rows]
    if options.by:
        by = options.by
        rows = [replace(r, meta=r.meta | {by: salt.hash("group", r.meta[by])}) if by in r.meta else r for r in rows]
    return rows if options.keep_paths else [replace(row, name=salt.hash("path", row.name)) for row in rows]


def _check_by(rows: list[Row], options: BuildOptions, table: Path | None, from_files: bool) -> None:
    name = options.by
    whole = name == options.columns.get("group", "group")
    if name and not from_files and not any(row.group if whole else row.meta.get(name) for row in rows):
        have = sorted({key for row in rows for key in row.meta} | ({"group"} if any(r.group for r in rows) else set()))
        raise DataError(f"--by {name}: {table or 'without --table'} has no such column{nearest(name, have)}")
    if options.stratify and from_files and not all(row.group for row in rows):
        raise DataError(
            "--stratify must know the patients before a DICOM file is read: give the table a column group, or let "
            "--folders name them"
        )


def _stratified(rows: list[Row], options: BuildOptions) -> list[Row]:
    by = options.by if options.by != options.columns.get("group", "group") else ""
    units = [_unit(by, row.meta, hash64(row.group.encode()) if row.group else 0, key_of(row.name)) for row in rows]
    kept = _kept(Index.open(options.keep_splits), by) if options.keep_splits else {}
    splits = stratified(units, [row.labels for row in rows], parse_split(options.split), options.split_seed, kept)
    return [replace(row, split=split) for row, split in zip(rows, splits, strict=True)]


def _kept(index: Index, by: str) -> dict[Hashable, str]:
    """{unit: split} of an earlier index. Its files are units too: pages without a group got the name of their file for
    one, which no row has before it is packed."""
    groups, splits = np.asarray(index.column("group")), np.asarray(index.column("split"))
    metas = (index.meta(i) if by else {} for i in range(len(index)))
    rows = zip(metas, groups.tolist(), splits.tolist(), strict=True)
    found: dict[Hashable, str] = {}
    for i, (meta, group, split) in enumerate(rows):
        if split:
            file = file_key(index.key(i))
            found[file] = found[_unit(by, meta, group, file)] = index.splits[split]
    return found


def _unit(by: str, meta: dict[str, str], group: int, key: str) -> Hashable:
    """What stays together: images of one value of the column `by`, or of one group, or else the image alone."""
    return (by and meta.get(by)) or group or key


def _audited(options: BuildOptions, rows: Sequence[Row]) -> frozenset[str]:
    """Keys that an audit.json names. DataError when it is none, or of another index."""
    if options.drop_duplicates in ("", "exact"):
        return frozenset()
    path = Path(options.drop_duplicates)
    try:
        audit = json.loads(path.read_text(encoding="utf-8"))
        if audit.get("format") != AUDIT:
            raise ValueError
        drop = frozenset(str(key) for name in ("drop", "leaks") for key in audit.get(name, ()))
    except (OSError, ValueError, AttributeError, TypeError):
        raise DataError(f"--drop-duplicates {path}: no audit.json that can be read") from None
    known = {key_of(row.name) for row in rows}
    if drop and not any(file_key(key) in known for key in drop):
        raise DataError(f"--drop-duplicates {path}: none of its {len(drop):,} keys is of these images")
    return drop
