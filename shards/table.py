"""A CSV table and a folder of images become rows: every image found, every cell understood, or an error."""

from __future__ import annotations

import csv
import difflib
import os
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from shards.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
ROLES = ("path", "label", "source", "group", "split", "text", "mask")
_SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}


@dataclass(frozen=True)
class Row:
    """One image to pack, and what the table says of it."""

    image: Path
    name: str  # path below the image folder, as POSIX
    labels: tuple[str, ...] = ()
    source: str = ""
    group: str = ""
    split: str = ""
    text: str = ""
    mask: Path | None = None
    meta: dict[str, str] = field(default_factory=dict)


def find_images(folder: Path) -> dict[str, Path]:
    """{POSIX path below the folder: file} of every image by its suffix, hidden files left out."""
    if not folder.is_dir():
        raise DataError(f"image folder {folder} does not exist")
    found = {}
    for base, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(base, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                found[_plain(path.relative_to(folder).as_posix())] = path
    if not found:
        raise DataError(f"image folder {folder} holds no image ({' '.join(SUFFIXES)})")
    return dict(sorted(found.items()))


def read_table(table: Path, folder: Path, images: dict[str, Path], asked: dict[str, str]) -> list[Row]:
    """The rows of a CSV table, in its order. `asked` names columns for ROLES other than by default."""
    header, lines = _read_csv(table)
    columns = _columns(table, header, asked)
    find = _Finder(folder, table, images)
    rows, seen = [], {}
    for number, cells in lines:
        cell = {role: cells[name].strip() for role, name in columns.items()}
        where = f"{table} row {number}"
        if not cell["path"]:
            raise DataError(f"{where}: the column {columns['path']!r} is empty; every row names an image")
        name = find.image(cell["path"], where)
        if name in seen:
            raise DataError(f"{where} names {name}, and so does row {seen[name]}: keep one row an image")
        seen[name] = number
        split = cell.get("split", "").lower()
        rows.append(
            Row(
                image=images[name],
                name=name,
                labels=tuple(part.strip() for part in cell.get("label", "").split("|") if part.strip()),
                source=cell.get("source", ""),
                group=cell.get("group", ""),
                split=_SPLIT_NAMES.get(split, split),
                text=cell.get("text", ""),
                mask=find.mask(cell["mask"], where) if cell.get("mask") else None,
                meta={k: v for k, v in cells.items() if k not in columns.values() and v != ""},
            )
        )
    if not rows:
        raise DataError(f"{table} has a header and no row")
    return rows


def split_of(name: str, parts: list[tuple[str, float]], seed: int = 0) -> str:
    """The split of a group by its hash alone: images added later move no one. `parts`: (name, share), sum 1."""
    digest = blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    at = int.from_bytes(digest, "little") / 2**64
    for split, share in parts:
        if at < share:
            return split
        at -= share
    return parts[-1][0]


def parse_split(text: str) -> list[tuple[str, float]]:
    """`70/10/20` -> shares of train, val and test; `80/20` -> train and test."""
    try:
        shares = [float(part) for part in text.split("/")]
        names = {2: ("train", "test"), 3: ("train", "val", "test")}[len(shares)]
    except (ValueError, KeyError):
        raise DataError(f"--split {text}: write shares of train/val/test such as 70/10/20, or of train/test") from None
    if min(shares) < 0 or abs(sum(shares) - 100) > 1e-6:
        raise DataError(f"--split {text}: the shares sum to {sum(shares):g} where 100 is needed")
    return [(name, share / 100) for name, share in zip(names, shares, strict=True)]


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
                lines.append((reader.line_num, dict(zip(header, cells, strict=True))))
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8 text (byte {error.start:,}): save it as CSV UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{table} cannot be read as CSV: {error}") from None
    if len(set(header)) < len(header):
        raise DataError(f"{table}: two columns are called {max(header, key=header.count)!r}")
    return header, lines


def _columns(table: Path, header: list[str], asked: dict[str, str]) -> dict[str, str]:
    """{role: column name} for the roles that the table fills."""
    columns = {role: asked.get(role, role) for role in ROLES if role in asked or role in header}
    for role in ("path", *asked):
        name = asked.get(role, role)
        if name not in header:
            raise DataError(
                f"{table} has no column {name!r} among {', '.join(header) or 'none at all'}: "
                f"name the right one with --{role}-column{nearest(name, header)}"
            )
    return columns


class _Finder:
    """Which file a cell means: its path below the images or beside the table, with or without suffix or folder."""

    def __init__(self, folder: Path, table: Path, images: dict[str, Path]):
        self.folder, self.table, self.images = folder, table, images
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
            raise DataError(f"{where}: {cell!r} could be any of {', '.join(matches[:3])}: write the whole path")
        if not matches:
            raise DataError(f"{where}: image {cell!r} is not in {self.folder}{nearest(name, list(self.images)[:5000])}")
        return matches[0]

    def mask(self, cell: str, where: str) -> Path:
        for base in (self.table.parent, self.folder):
            if (path := base / cell).is_file():
                return path
        raise DataError(f"{where}: mask {cell!r} is neither beside the table nor in {self.folder}")


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS writes é as two characters
