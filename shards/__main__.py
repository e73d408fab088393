"""python -m shards demo | build | index | audit | stats: images and a table become tar shards that training reads."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from shards import audit_verb, build, build_verb, demo, scan
from shards.address import public
from shards.errors import DataError
from shards.index import Index
from shards.place import header_of
from shards.progress import bar
from shards.stats import Stats, stats
from shards.terminal import Terminal

console = Terminal()

_EXAMPLES = {
    "": "python -m shards demo --out data/demo\n"
    "python -m shards build --images photos/ --table labels.csv --out data/derm\n"
    "python -m shards stats data/derm\n"
    "python -m shards audit data/derm --against data/clinic-test --out audit/derm",
    "demo": "python -m shards demo --out data/demo",
    "build": build_verb.EXAMPLES,
    "index": "python -m shards index data/tars --source hospital_a\npython -m shards index data/derm --merge",
    "audit": audit_verb.EXAMPLES,
    "stats": "python -m shards stats data/derm --verify",
}
_ABOUT = {
    "demo": "Draw the synthetic demo set: dermoscopy-like images of seven classes. No data of any patient.",
    "build": build_verb.ABOUT,
    "index": "Index WebDataset tars where they lie, or join the parts of a build. The tars are not changed. Of "
    "each sample are used: an image (jpg, jpeg, png, webp, tif) and, where there, json (label, source, group, split, "
    "meta), cls, txt, mask.png. With --merge: join the parts that `build --part` wrote.",
    "audit": audit_verb.ABOUT,
    "stats": "Count samples, classes, splits, sources and sizes of an index, and name what looks wrong.",
}


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except DataError as error:
        return _fail(str(error))
    except OSError as error:  # a full disk, a folder that may not be written
        return _fail(f"{error.filename or 'file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return _fail("stopped; nothing half-written counts, and a build goes on where it was", 130)
    return 0


def _fail(message: str, code: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    def examples(verb: str) -> str:
        return "example:\n" + "\n".join("  " + line for line in _EXAMPLES[verb].splitlines())

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m shards", description=__doc__, epilog=examples(""), formatter_class=raw)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        about = _ABOUT[name]
        sub = verbs.add_parser(
            name,
            help=about.split(". ")[0].rstrip("."),
            description=textwrap.fill(about, 90),
            epilog=examples(name),
            formatter_class=raw,
        )
        sub.set_defaults(run=run)
        return sub

    sub = verb("demo", _demo)
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to make")
    sub.add_argument("--samples", type=int, default=1600, metavar="N", help="images (default 1600)")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another set (default 0)")
    sub.add_argument("--size", type=int, default=128, metavar="PX", help="side of an image (default 128)")
    text = "share of training patients without labels (default 0.5)"
    sub.add_argument("--withheld", type=float, default=0.5, metavar="SHARE", help=text)
    sub.add_argument("--overwrite", action="store_true", help="replace an index that is there")
    build_verb.add_arguments(verb("build", _build))
    sub = verb("index", _index)
    sub.add_argument("folder", type=Path, metavar="DIR", help="the folder with the tars")
    text = "the hospital or data set, for samples that do not name theirs"
    sub.add_argument("--source", default="", metavar="NAME", help=text)
    sub.add_argument("--split", default="", metavar="NAME", help="split of samples that do not name theirs: train, ...")
    text = "of the images as read (default: as an index that is there says, else 3)"
    sub.add_argument("--channels", type=int, metavar="N", help=text)
    sub.add_argument("--merge", action="store_true", help="join the parts that `build --part I/N --out DIR` wrote")
    sub.add_argument("--overwrite", action="store_true", help="with --merge: replace an index that is there")
    audit_verb.add_arguments(verb("audit", audit_verb.run))
    sub = verb("stats", _stats)
    text = "a folder with an index, or its address (s3://, gs://, hf://, https://)"
    sub.add_argument("folder", type=Path, metavar="DIR", help=text)
    sub.add_argument("--verify", action="store_true", help="also read every byte and compare the checksums")
    return parser


def _demo(args: argparse.Namespace) -> None:
    with bar("drawing") as tick:
        index = demo.generate(args.out, args.samples, args.seed, args.size, args.withheld, args.overwrite, tick)
    _summary(index, f"accelerate launch pretrain recipe=demo data.train={args.out}")


def _build(args: argparse.Namespace) -> None:
    if built := build_verb.run(args):
        _summary(built.index, f"python -m hybridssl doctor --data {args.out}")


def _index(args: argparse.Namespace) -> None:
    if args.merge:
        with bar("joining") as tick:
            built = build.join(args.folder, args.overwrite, tick)
        build_verb.tell(built, args.folder)
        return _summary(built.index, f"python -m hybridssl doctor --data {args.folder}")
    if not args.folder.is_dir():
        raise DataError(f"{args.folder} is no folder")
    before = header_of(args.folder) or {}  # what the tars themselves do not say
    tars = len(list(args.folder.glob("*.tar")))
    with bar("indexing") as tick:
        done = iter(range(1, tars + 1))
        index = scan.write(
            args.folder,
            synthetic=bool(before.get("synthetic")),
            channels=args.channels or before.get("channels", 3),
            source=args.source,
            split=args.split,
            in_place=bool(before.get("in_place", True)),
            progress=lambda name: tick(next(done), tars),
        )
    _summary(index, f"python -m hybridssl doctor --data {args.folder}")


def _stats(args: argparse.Namespace) -> None:
    index = Index.open(args.folder)
    if args.verify:
        with console.status("comparing checksums"):
            index.verify()
    found = stats(index)
    _print_classes(index, found)
    _summary(index, f"python -m hybridssl doctor --data {public(str(args.folder))}", found)
    if args.verify:
        console.print("every checksum agrees")


def _print_classes(index: Index, found: Stats) -> None:
    if not index.classes:
        return
    table = Table(title=f"classes of {index.root}")
    for name in ("class", *(split or "(no split)" for split in found.splits), "all"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for kind, counts in sorted(found.classes.items(), key=lambda item: -sum(item[1].values())):
        table.add_row(kind, *(f"{counts.get(s, 0):,}" for s in found.splits), f"{sum(counts.values()):,}")
    console.print(table)
    table = Table("source", "samples", "labelled", "names", title="sources")
    for source, counts in found.sources.items():
        total = sum(counts.values())
        labelled = total - counts.get("", 0)
        table.add_row(source, f"{total:,}", f"{labelled:,}", _classes(len(index.vocabulary[source])))
    console.print(table)


def _summary(index: Index, then: str, found: Stats | None = None) -> None:
    found = found or stats(index, look_at=50)
    table = Table(title=f"{index.root}" + (" (synthetic)" if index.synthetic else ""), show_header=False)
    low, middle, high = found.sides
    shards = len(index.shards)
    rows = {
        "samples": f"{found.samples:,} in {shards:,} shard{'s' if shards > 1 else ''}, {found.bytes / 2**20:,.1f} MiB",
        "labelled": f"{found.labelled:,} ({found.labelled / found.samples:.0%}), {_classes(len(index.classes))}",
        "splits": ", ".join(f"{name or '(none)'} {count:,}" for name, count in found.splits.items()),
        "sources": ", ".join(index.sources[:8]) + (" ..." if len(index.sources) > 8 else "") or "none named",
        "groups": f"{found.groups:,}" if found.groups else "none named",
        "masks, reports": f"{found.masks:,}, {found.texts:,}",
        "short side": f"{low} to {high} px, median {middle} (of {found.looked_at:,} looked at)",
        "quarantined": "not known here" if found.quarantined is None else f"{found.quarantined:,}",
    }
    if found.damaged:
        rows["damaged"] = f"{found.damaged:,} of the {found.looked_at:,} looked at"
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)
    for warning in found.warnings:
        console.print(f"note: {warning}", style="yellow")
    console.print(f"next: {then}", soft_wrap=True)


def _classes(n: int) -> str:
    return f"{n:,} class{'' if n == 1 else 'es'}"


if __name__ == "__main__":
    sys.exit(main())
