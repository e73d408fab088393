"""The verb `build`: its flags, in groups, and what it prints. `index --merge` ends what parts of a build began."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from shards import build
from shards.errors import DataError
from shards.options import BuildOptions
from shards.place import partial_of
from shards.privacy import read_salt
from shards.progress import bar
from shards.table import ROLES, told
from shards.terminal import Terminal

ABOUT = (
    "Pack a folder of images into tar shards with an index. Images are JPEG, PNG, WebP, BMP, TIFF or DICOM; what is "
    "known of them comes from a table or from the names of folders. Only --images and --out are needed. A file that "
    "cannot be read is set aside in quarantine.jsonl with the reason. An interrupted build goes on where it was: give "
    "the same command again."
)
EXAMPLES = """\
python -m shards build --images photos/ --table labels.csv --out data/derm
python -m shards build --images photos/ --folders label --out data/derm --short-side 256
python -m shards build --images photos/ --table labels.csv --out data/derm \\
    --label-column diagnosis --group-column patient --split 70/10/20
python -m shards build --images ct/ --out data/ct --channels 1 --salt-file salt.txt --window 40,400
python -m shards build --images bands/ --out data/bands --channels 5 --stack
python -m shards build --images ct/ --out data/ct --channels 5 --slices series --frames 5 \\
    --salt-file salt.txt --window 40,400"""
NOTES = """\
splits:
  --split draws by a hash of the patient (or of what --by names) and of nothing else, so images that come later move
  no one. The price: a class is divided in these shares only up to chance, and a rare one may miss a split (the
  summary says so; --split-seed draws again). With --stratify every class is divided in the shares to within one
  patient. That depends on who else is there, so when images are added, name the index of before with --keep-splits:
  its patients stay where they are, and the new ones fill what is short. (No rule that looks at one patient alone can
  do both.) A patient with several classes counts for the rarest.

identifiers:
  DICOM files are packed only with --salt-file: a file of yours, with one line of 16 or more characters, which is never
  stored. Patient, study and series are then kept as salted hashes (meta.study, meta.series; the patient becomes the
  group), so that the same patient is the same in every build with that salt. Groups of a table, the column of --by and
  the paths of all files are hashed too, for folders are often called like patients; --linkage writes the table that
  leads back, --keep-paths stores the paths. Of the tags, only codes and numbers can be kept, and none of the patient
  unless --tags asks for it (PatientSex, PatientAge). What you cannot leave to this program: other columns of your
  table, free text, what cameras write into JPEG files (--short-side drops it), and names that are burnt into pixels
  (files that admit it are set aside).

on a cluster:
  every task of an array builds a part, on a folder that all can see, and the last step joins them; the bytes are those
  of one build:
    python -m shards build --images photos/ --out data/derm --part $SLURM_ARRAY_TASK_ID/8     (array 1-8)
    python -m shards index data/derm --merge"""
_COLUMNS = {
    "path": "the image: its path below --images or beside the table, or its name where that is unique",
    "label": "the class; empty: unlabelled; a|b: both",
    "source": "the hospital or data set: whose list of classes counts",
    "group": "the patient or lesion: never on both sides of a split",
    "split": "train, val or test",
    "text": "a sentence of report",
    "mask": "path of a mask image",
}
_NUMBER = {"type": int, "default": 0, "metavar": "N"}
_SWITCH = {"action": "store_true"}
_GROUPS: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "": {
        "--folders": (
            {"default": "", "metavar": "LEVELS"},
            "what the folders below --images mean, from the top, where the table says nothing: label, split/label, "
            "source/-/group, ...",
        ),
        "--source": ({"default": "", "metavar": "NAME"}, "of images for which neither table nor folder names one"),
    },
    "what is stored": {
        "--shard-size": (
            {"default": "256MB", "metavar": "N"},
            "of a shard, about: 256MB (the default), or a number of files such as 1000",
        ),
        "--short-side": (_NUMBER | {"metavar": "PX"}, "shrink larger images; without it, bytes stay as they are"),
        "--quality": (
            _NUMBER | {"default": 92},
            "of the JPEG that a shrunken image becomes (92); 16 bits, or more than 3 channels, stay without loss",
        ),
        "--drop-duplicates": (
            {"nargs": "?", "const": "exact", "default": "", "metavar": "AUDIT"},
            "leave out images with the same pixels as another, or what an audit.json (`python -m shards audit`) names",
        ),
    },
    "channels, bits, frames": {
        "--channels": (
            _NUMBER | {"default": 3},
            "of the images as read later: 3 (default), 1 (grey), or as many planes as they have",
        ),
        "--stack": (_SWITCH, "the pages of a TIFF, or the frames of a DICOM file, are the channels of one image"),
        "--slices": (
            {"default": "", "metavar": "BY"},
            "files are the channels of one image, a slice each: those of one DICOM series (BY: series), of one folder "
            "(folder), or of one value of a table's column; in the order of their positions, else of the numbers in "
            "their names",
        ),
        "--frames": (
            _NUMBER,
            "at most so many pages or frames of a file, or slices of a series, evenly spread; 1: the middle one "
            "(default: all; without --stack or --slices each is a sample, and those of one file stay in one split)",
        ),
        "--bits": (
            _NUMBER,
            "how many bits of 16-bit PNG and TIFF images are used, such as 12 or 14 (default: by the largest value of "
            "each image)",
        ),
    },
    "DICOM (see below: identifiers)": {
        "--salt-file": (
            {"type": Path, "metavar": "FILE"},
            "the secret with which identifiers are hashed; needed for DICOM",
        ),
        "--window": (
            {"default": "file", "metavar": "W"},
            "which grey values are black and white: file (its own window, else full; the default), full (the smallest "
            "and the largest of the image), or CENTRE,WIDTH such as 40,400 (--window=-600,1500 if it begins with -)",
        ),
        "--tags": ({"nargs": "+", "default": [], "metavar": "NAME"}, "more tags for meta, such as KVP or PatientSex"),
        "--keep-paths": (_SWITCH, "store the paths of files as they are: they name no patient"),
        "--keep-burned-in": (_SWITCH, "pack files that say that text is burnt into their pixels"),
        "--linkage": ({"type": Path, "metavar": "FILE"}, "write a CSV of paths and keys; keep it with the originals"),
    },
    "splits (see below)": {
        "--split": ({"default": "", "metavar": "70/10/20"}, "shares of train/val/test, instead of the table's"),
        "--by": ({"default": "", "metavar": "COLUMN"}, "what stays together (default: the group, or the image)"),
        "--split-seed": (_NUMBER, "another seed, another split"),
        "--stratify": (_SWITCH, "divide every class in these shares"),
        "--keep-splits": (
            {"default": "", "metavar": "DIR"},
            "with --stratify: an earlier index whose patients stay where they are",
        ),
    },
}
_FLAGS = (
    *("folders", "source", "shard_size", "short_side", "quality", "channels", "bits", "stack", "slices", "frames"),
    *("window", "keep_paths", "keep_burned_in", "split", "by", "split_seed", "stratify", "keep_splits"),
    *("drop_duplicates", "part", "workers", "overwrite"),
)
console = Terminal()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"{NOTES}\n\n{parser.epilog}"
    add = parser.add_argument
    add("--images", required=True, type=Path, metavar="DIR", help="folder of images, searched with all below it")
    add("--out", required=True, type=Path, metavar="DIR", help="the folder to make")
    add("--overwrite", action="store_true", help="replace an index that is there")
    add("--workers", type=int, default=0, metavar="N", help="cores to use (default: all)")
    add("--part", type=_part, default=(1, 1), metavar="I/N", help="build this part only (see below: on a cluster)")

    group = parser.add_argument_group("what is known of the images", "Other columns of the table are kept as meta.")
    group.add_argument(
        "--table", type=Path, metavar="FILE", help="CSV or Parquet, one row per image (default: all images)"
    )
    for role in ROLES:
        flags = [f"--{role}-column"] + (["--image-column"] if role == "path" else [])
        text = f"{_COLUMNS[role]} (default: {role})"
        group.add_argument(*flags, dest=f"{role}_column", metavar="NAME", help=text)
    for title, flags in _GROUPS.items():
        group = group if title == "" else parser.add_argument_group(title)
        for flag, (options, text) in flags.items():
            group.add_argument(flag, help=text, **options)


def run(args: argparse.Namespace) -> build.Built | None:
    """None after one part of several."""
    columns = {role: name for role in ROLES if (name := getattr(args, f"{role}_column")) is not None}
    if columns and args.table is None:
        raise DataError(f"--{next(iter(columns))}-column names a column, but there is no --table")
    salt = read_salt(args.salt_file) if args.salt_file else ""
    if args.salt_file and not salt:
        raise DataError(f"--salt-file {args.salt_file} is empty")
    flags = {name: getattr(args, name) for name in _FLAGS}
    options = BuildOptions(columns=columns, tags=tuple(args.tags), salt=salt, **flags)
    if args.linkage:
        build.write_linkage(args.linkage, args.images, args.table, options)
    with bar("packing") as tick:
        if options.part[1] > 1:
            build.build_part(args.images, args.out, args.table, options, tick)
            number, of = options.part
            console.print(f"part {number}/{of} is in {partial_of(args.out)}")
            console.print(f"next, when all are there: python -m shards index {args.out} --merge", soft_wrap=True)
            return None
        built = build.build(args.images, args.out, args.table, options, tick)
    if built.left.ignored:
        console.print(f"{built.left.ignored:,} images of {args.images} are not in the table and were left out")
    if built.left.unread:
        console.print(f"of {args.images}, {told(built.left.unread)}", style="yellow", soft_wrap=True)
    if built.left.splits:
        console.print(
            f"{built.left.splits:,} images had a split of their own, which --split {args.split} overrides: without "
            "--split it is kept",
            style="yellow",
            soft_wrap=True,
        )
    tell(built, args.out)
    return built


def tell(built: build.Built, out: Path) -> None:
    """What is not in the index."""
    if built.dropped:
        console.print(f"{built.dropped:,} duplicates were left out")
    if built.quarantined:
        console.print(
            f"{built.quarantined:,} images cannot be read and were left out: see {out}/quarantine.jsonl", style="yellow"
        )


def _part(text: str) -> tuple[int, int]:
    try:
        number, of = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write I/N, such as 3/8") from None
    return number, of
