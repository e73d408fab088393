"""What `select` hands to the annotators, a table and the images beside it: written, kept from harm, and led back.

OUT/to_label.csv has an empty column `label`; whoever fills it works for days, with a spreadsheet of theirs. So nothing
here is written over unless it is read, as `python -m shards build` reads it, and found to hold no work.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from finetune.strategies import Pick
from hybridssl.errors import UserError
from hybridssl.files import write_text, writing
from shards.errors import DataError
from shards.format import extension
from shards.index import Index
from shards.spreadsheet import safe
from shards.table import Row, find_images, read_table

TABLE, IMAGES = "to_label.csv", "images"
COLUMNS = ("path", "label", "source", "group", "split", "key", "shard", "original", "score", "reason")
HOW = "choose another --out, or --overwrite"


def keep_work(out: Path) -> None:
    """UserError when what lies in `out` may be the work of annotators: labels, or files that the table does not name.

    So is a table that cannot be read: who knows what it holds.
    """
    table, images = out / TABLE, out / IMAGES
    try:
        rows = read_table(table, images, find_images(images).images, {}) if table.exists() else []
    except DataError as error:
        raise UserError(f"{error}. There may be labels in {table}: {HOW}") from None
    if filled := sum(map(_worked_on, rows)):
        raise UserError(f"{table} has {filled:,} labels filled in: {HOW}")
    ours = {row.image for row in rows}
    for path in sorted(images.iterdir()) if images.exists() else []:
        if path not in ours and not path.name.startswith("."):
            raise UserError(f"{path} is no image of {table}, and would be deleted: {HOW}")


def _worked_on(row: Row) -> bool:
    """Whether a cell is filled that was not: also in a column that is new, or was renamed."""
    return bool(row.labels or row.text or row.mask or row.meta.keys() - {*COLUMNS})


def write(out: Path, index: Index, numbers: np.ndarray, picks: Sequence[Pick]) -> None:
    """OUT/to_label.csv and OUT/images in place of what is there. numbers: of the pool that the picks are rows of."""
    write_images(index, numbers[[pick.row for pick in picks]], out / IMAGES)
    write_text(out / TABLE, as_csv(index, numbers, picks))


def as_csv(index: Index, numbers: np.ndarray, picks: Sequence[Pick]) -> str:
    """A table as `python -m shards build` reads it; columns that it does not know become meta of the samples.

    Whoever fills it opens it in a spreadsheet: text that would run there as a formula is quoted; `build` reads it back.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for pick in picks:
        number = int(numbers[pick.row])
        sample = index.read(number)
        place = [sample.key, index.shard_of(number)[0], sample.meta.get("path", ""), f"{pick.score:.4f}", pick.reason]
        row = [file_name(sample.key, sample.image), "", sample.source, sample.group, "train", *place]
        writer.writerow(map(safe, row))
    return text.getvalue()


def write_images(index: Index, numbers: np.ndarray, folder: Path) -> None:
    """The bytes of the images as they lie in the shards; what an earlier choice left there goes."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for number in numbers.tolist():
        sample = index.read(number)
        path = folder / file_name(sample.key, sample.image)
        with writing(path):
            path.write_bytes(sample.image)


def file_name(key: str, image: bytes) -> str:
    """A name below the folder, whatever the key: an index of others may hold `../../x`. Its hash keeps it unique."""
    if not re.fullmatch(r"\w[\w -]*", key):
        key = f"{re.sub(r'[^A-Za-z0-9_-]+', '_', key)[:60]}-{sha256(key.encode()).hexdigest()[:10]}"
    return f"{key}.{extension(image)}"


def build_options(index: Index, images: Path) -> str:
    """What `build` must be told of images that are not photographs in colour; `images`: the folder they are in."""
    said = [f"--channels {index.channels}"] if index.channels != 3 else []
    if index.channels > 1 and any(images.glob("*.tif")):  # in an index, the pages of a TIFF are channels of one image
        said.append("--stack")
    return " ".join(said)


def feed_back(out: Path, options: str) -> str:
    """The command that makes a labelled index of the filled table. options: of build_options."""
    command = f"python -m shards build --images {out / IMAGES} --table {out / TABLE} --out NEW_INDEX"
    return f"{command} {options}".rstrip()
