"""The verb `audit`: its flags and what it prints. Features and the page, which belong to the assemblies, come late."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from shards.address import public
from shards.index import Index
from shards.progress import bar
from shards.terminal import Terminal

ABOUT = (
    "Look for what spoils a set or a comparison. That is: copies (resized, re-encoded, flipped, cropped), also across "
    "splits; images that another index also holds; contradicting labels; damaged images; burnt-in rims; and whatever "
    "predicts the label without the picture. Writes audit.json, which stream.exclude and `build --drop-duplicates` act "
    "on, and audit.html to look at (with pictures: as confidential as they are)."
)
EXAMPLES = """\
python -m shards audit data/derm --out audit/derm
python -m shards audit data/derm --against data/clinic-test --out audit/derm
python -m shards audit data/derm --backbone models/derm-s --out audit/derm"""


def add_arguments(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add(
        "folder",
        type=Path,
        metavar="DIR",
        help="a folder with an index, or its address (s3://, gs://, hf://, https://)",
    )
    add(
        "--against",
        nargs="+",
        type=Path,
        default=[],
        metavar="OTHER",
        help="other indexes (an evaluation set, say) that must share no image with it",
    )
    add("--out", required=True, type=Path, metavar="FOLDER", help="where audit.json and audit.html go")
    spec = (
        "also judge what this backbone finds alike, such as heavier crops: a run or exported folder, timm:NAME, hf:ID "
        "or histogram"
    )
    add("--backbone", default="", metavar="SPEC", help=spec)
    add("--device", default="cpu", metavar="NAME", help="of the backbone (default cpu)")


def run(args: argparse.Namespace) -> None:
    from shards.audit import audit, begin, write  # faiss and scipy, which no other verb waits for

    index, against = Index.open(args.folder), [Index.open(other) for other in args.against]
    suggest = import_module("finetune.lookalikes").suggester(args.backbone, args.device) if args.backbone else None
    path = args.out / "audit.json"
    begin(path)
    found = audit(index, against, suggest, bar)
    write(found.document, path)
    page = import_module("finetune.audit_page")
    page.write(found, args.out / "audit.html")
    console, folder = Terminal(soft_wrap=True, highlight=False), public(str(args.folder))
    console.print(page.answer(found.document))
    console.print(f"wrote {path} and {args.out / 'audit.html'}: look at it")
    if found.document["drop"] or found.document["leaks"]:
        console.print(f"next: accelerate launch pretrain data.train={folder} stream.exclude={path} out=runs/NAME")
    else:
        console.print(f"next: python -m hybridssl doctor --data {folder}")
