"""A table and a folder of images become rows: every image found, every cell understood, or an error."""

from __future__ import annotations

import csv
import difflib
import os
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from shards import readers
from shards.cells import there, whole
from shards.errors import DataError
from shards.sources import SUFFIXES
from shards.spreadsheet import restored

# Pictures of formats that are not read. Of other suffixes nothing is said: names of patients may stand there.
PICTURES = (
    *(".heic", ".heif", ".avif", ".gif", ".jp2", ".j2k", ".jxl", ".psd", ".pdf"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"),
    *(".svs", ".ndpi", ".mrxs", ".scn", ".czi", ".vsi", ".lif"),
    *(".nii", ".nrrd", ".mha", ".mhd", ".npy", ".npz", ".zip", ".tar"),
)
# What the column with the images is called elsewhere: for the hint, should `path` be missing.
_PATH_NAMES = ("filename", "file_name", "filepath", "file_path", "file", "image_path", "image_id", "image_name", "img")
ROLES = ("path", "label", "source", "group", "split", "text", "mask")
_SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}


@dataclass(frozen=True)
class Row:
    """One file to pack, and what is said of it."""

    image: Path
    name: str  # path below the image folder, as POSIX; hashed where there is a salt
    labels: tuple[str, ...] = ()
    source: str = ""
    group: str = ""
    split: str = ""
    text: str = ""
    mask: Path | None = None
    slices: tuple[Path, ...] = ()  # all files of the image, where each holds one of its channels (slices.py)
    meta: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What lies in a folder of images."""

    images: dict[str, Path]  # {POSIX path below the folder: file}, in the order of the paths
    unread: dict[str, int]  # {suffix: number} of pictures in a format that is not read


def find_images(folder: Path) -> Found:
    """Every image below a folder, by its suffix or first bytes; hidden files are left out, links that lead out of the
    folder are followed. Raises DataError for a folder that does not exist, cannot be listed or holds no image."""
    if not folder.is_dir():
        raise DataError(f"image folder {folder} does not exist")
    found, unread, walked = {}, Counter[str](), {folder.resolve()}
    for base, folders, files in os.walk(folder, onerror=_cannot_list, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not name.startswith(".") and _new(Path(base, name), walked)]
        for name in files:
            path = Path(base, name)
            if not name.startswith(".") and (path.suffix.lower() in SUFFIXES or readers.of_file(path)):
                found[_plain(path.relative_to(folder).as_posix())] = path
            elif path.suffix.lower() in PICTURES:
                unread[path.suffix.lower()] += 1
    if not found:
        there = f"; {told(unread)}" if unread else ""
        raise DataError(f"image folder {folder} holds no image ({' '.join((*SUFFIXES, *readers.suffixes()))}){there}")
    return Found(dict(sorted(found.items())), dict(unread))


def told(unread: dict[str, int]) -> str:
    """The pictures that were passed over, in words."""
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(unread.items()))
    return f"{kinds} not read: convert them (to PNG or TIFF), or add a reader (docs/add-a-source.md)"


def _new(folder: Path, walked: set[Path]) -> bool:
    """Whether it is a folder, or leads to one that is neither within those that are walked nor around them."""
    if not folder.is_symlink():
        return True
    real = folder.resolve()
    if any(real.is_relative_to(other) or other.is_relative_to(real) for other in walked):
        return False
    walked.add(real)
    return True


def _cannot_list(error: OSError) -> None:
    raise DataError(f"folder {error.filename} cannot be listed ({error.strerror}): its images would be missing")


def from_folders(row: Row, levels: tuple[str, ...]) -> Row:
    """What the folders on the way to the image say, from the top, of roles that the table leaves empty."""
    folders = PurePosixPath(row.name).parts[:-1]
    said = {role: name for role, name in zip(levels, folders, strict=False) if role != "-"}
    new: dict[str, Any] = {r: said[r] for r in ("source", "group") if r in said and not getattr(row, r)}
    if "split" in said and not row.split:
        new["split"] = split_name(said["split"])
    if "label" in said and not row.labels:
        new["labels"] = (said["label"],)
    return replace(row, **new)


def split_name(text: str) -> str:
    return _SPLIT_NAMES.get(text.lower(), text.lower())


def read_table(
    table: Path, folder: Path, images: dict[str, Path], asked: dict[str, str], private: bool = False
) -> list[Row]:
    """The rows of a CSV or Parquet table, in its order. `asked` names columns for ROLES other than by default.

    `private`: no error repeats a cell, for it may hold a name.
    """
    header, lines = _read_parquet(table) if table.suffix.lower() in (".parquet", ".pq") else _read_csv(table)
    columns = _columns(table, header, asked)
    find = _Finder(folder, table, images, private)
    rows, seen = [], {}
    for number, cells in lines:
        cell = {role: cells[name].strip() for role, name in columns.items()}
        where = f"{table} row {number}"
        if not cell["path"]:
            raise DataError(f"{where}: the column {columns['path']!r} is empty; every row names an image")
        name = find.image(cell["path"], where)
        if name in seen:
            what = "the same image as" if private else f"{name}, and so does"
            raise DataError(f"{where} names {what} row {seen[name]}: keep one row an image")
        seen[name] = number
        rows.append(
            Row(
                image=images[name],
                name=name,
                labels=tuple(whole(part.strip()) for part in cell.get("label", "").split("|") if part.strip()),
                source=whole(cell.get("source", "")),
                group=whole(cell.get("group", "")),
                split=split_name(whole(cell.get("split", ""))),
                text=cell.get("text", ""),
                mask=find.mask(cell["mask"], where) if cell.get("mask") else None,
                meta={k: v for k, v in cells.items() if k not in columns.values() and v != ""},
            )
        )
    if not rows:
        raise DataError(f"{table} has a header and no row")
    return rows


def nearest(name: str, names: list[str]) -> str:
    """`; did you mean 'x'?` when some name is close, else nothing."""
    by_lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), list(by_lower), 1, 0.5)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def _read_csv(table: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    if not table.is_file():
        raise DataError(f"table {table} does not exist")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            comma = max(",;\t", key=first.count)
            reader = csv.reader(file, delimiter=comma, strict=True)
            header = [name.strip() for name in next(reader, [])]
            lines = []
            for cells in reader:
                if not any(cells):
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{table} row {reader.line_num} has {len(cells)} cells where the header has {len(header)}: "
                        'put a cell that holds the separator in "quotes"'
                    )
                lines.append((reader.line_num, dict(zip(header, map(there, map(restored, cells)), strict=True))))
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8 text (byte {error.start:,}): save it as CSV UTF-8") from None
    except csv.Error as error:
        raise DataError(
            f"{table} row {reader.line_num} cannot be read as CSV ({error}): look for a quote that is not closed, "
            "there or above"
        ) from None
    if len(set(header)) < len(header):
        raise DataError(f"{table}: two columns are called {max(header, key=header.count)!r}")
    return header, lines


def _read_parquet(table: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise DataError(f"{table} needs pyarrow: pip install 'hybridssl[parquet]', or save it as CSV") from None
    if not table.is_file():
        raise DataError(f"table {table} does not exist")
    try:
        rows = pyarrow.parquet.read_table(table)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{table} cannot be read as Parquet: {error}") from None
    lines = [{name: _cell(value) for name, value in row.items()} for row in rows.to_pylist()]
    return list(rows.column_names), list(enumerate(lines, 1))


def _cell(value: Any) -> str:
    """A value of Parquet as it would stand in CSV: nothing is empty, and a list is `a|b`."""
    if isinstance(value, list):
        return "|".join(_cell(part) for part in value)
    return "" if value is None else there(str(value))


def _columns(table: Path, header: list[str], asked: dict[str, str]) -> dict[str, str]:
    """{role: column name} for the roles that the table fills."""
    if "path" not in header and "image" in header:
        asked = {"path": "image", **asked}
    columns = {role: asked.get(role, role) for role in ROLES if role in asked or role in header}
    for role in ("path", *asked):
        name = asked.get(role, role)
        if name not in header:
            usual = [column for column in header if role == "path" and column.lower() in _PATH_NAMES]
            hint = f"; did you mean {usual[0]!r}?" if usual else nearest(name, header)
            raise DataError(
                f"{table} has no column {name!r} among {', '.join(header) or 'none at all'}: "
                f"name the right one with --{role}-column{hint}"
            )
    return columns


class _Finder:
    """Which file a cell means: its path below the images or beside the table, with or without suffix or folder."""

    def __init__(self, folder: Path, table: Path, images: dict[str, Path], private: bool):
        self.folder, self.table, self.images, self.private = folder, table, images, private
        self.loose: dict[str, list[str]] = defaultdict(list)
        for name in images:
            path = PurePosixPath(name)
            for form in {path.with_suffix("").as_posix(), path.name, path.stem}:
                self.loose[form].append(name)

    def image(self, cell: str, where: str) -> str:
        name = _plain(cell.replace("\\", "/")).removeprefix("./")
        if name in self.images:
            return name
        beside = Path(os.path.normpath(self.table.parent.absolute() / cell))
        if beside.is_relative_to(self.folder.absolute()):
            below = _plain(beside.relative_to(self.folder.absolute()).as_posix())
            if below in self.images:
                return below
        matches = self.loose.get(name, [])
        if len(matches) > 1:
            like = "several" if self.private else f"any of {', '.join(matches[:3])}"
            raise DataError(f"{where}: {self._said('image', cell)} could be {like}: write the whole path")
        if not matches:
            near = "" if self.private else nearest(name, list(self.images)[:5000])
            raise DataError(f"{where}: {self._said('image', cell)} is not in {self.folder}{near}")
        return matches[0]

    def mask(self, cell: str, where: str) -> Path:
        for base in (self.table.parent, self.folder):
            if (path := base / cell).is_file():
                return path
        raise DataError(f"{where}: {self._said('mask', cell)} is neither beside the table nor in {self.folder}")

    def _said(self, what: str, cell: str) -> str:
        return f"its {what}" if self.private else f"{what} {cell!r}"


def _plain(name: str) -> str:
    """As it is stored: macOS writes é as two characters, and old archives bytes that are no UTF-8."""
    return unicodedata.normalize("NFC", name.encode("utf-8", "backslashreplace").decode())
