"""The door: `python -m finetune VERB`. A verb: one file with add_arguments(parser) and run(args), one line below."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from safetensors import SafetensorError

from hybridssl.errors import UserError
from shards.errors import DataError

VERBS = {
    "knn": "k nearest neighbours on frozen features; nothing is trained",
    "probe": "logistic regression and a linear probe on frozen features",
    "fewshot": "k labelled images per class, drawn many times: how few labels will do",
    "zeroshot": "classes that were never labelled, known by their names in words",
    "retrieve": "find similar cases: precision@k, mAP, and a page of queries with answers",
    "segment": "masks from frozen patches: linear, k-NN and UPerNet heads; IoU and Dice",
    "adapt": "train the backbone on the labels: full, LoRA, LP-FT or in part",
    "scaling": "how many labels it takes: shares of them x methods x seeds, as curves",
    "crossdomain": "other hospitals: train here, test there; what an unseen one costs",
    "robust": "worse photographs: blur, noise, hair ...; what the clean head loses on them",
    "fair": "is a result as good for every kind of patient? subgroups, gaps, worst group",
    "calibrate": "are its probabilities to be believed? errors, thresholds, prediction sets",
    "compare": "is one backbone better than another? paired tests on the same patients",
    "efficiency": "a few labelled masks, or a prompt a case? agreement of measurements, and cost",
    "explain": "for a case: where the backbone looks, and its nearest labelled cases",
    "drift": "have the images changed since training, and is retraining due?",
    "select": "which images to have labelled next, as a table for the annotators",
    "study": "rerun a published study on your own images: its steps, its figures, one page",
    "report": "collect results into one table and one HTML page",
}
EXAMPLES = """
examples:
  python -m finetune knn   --backbone models/derm-s --data data/derm --out results/derm-s
  python -m finetune probe --backbone models/derm-s --data data/derm --out results/derm-s
  python -m finetune probe --backbone timm:vit_small_patch14_dinov2 --data data/derm --out results/dinov2-s
  python -m finetune probe --backbone random:models/derm-s --data data/derm --out results/random     (null baseline)
  python -m finetune probe --backbone histogram --data data/derm --out results/histogram             (null baseline)
  python -m finetune compare results/*/logistic --out results          (paired over patients)
  python -m finetune study derm-suite data=data/derm backbones=models/derm-s,histogram --out results/suite
  python -m finetune report results --out results/report.html

Train labels teach, val labels choose hyper-parameters, test labels are read once. Intervals resample patients or
lesions (the `group` column), and images only where there is no group. `python -m finetune VERB --help` shows the
options of a verb.
"""


def parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the options of `verb` only: importing every verb would make --help wait for torch."""
    main_parser = argparse.ArgumentParser(
        prog="python -m finetune",
        description="Evaluate a backbone like a clinic: few labels, whole patients, intervals, and what it cost.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = main_parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        sub = verbs.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == verb:
            module = import_module(f"finetune.{name}")
            sub.description = module.__doc__
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return main_parser


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        args = parser(next((a for a in arguments if not a.startswith("-")), None)).parse_args(arguments)
        args.run(args)
        return 0
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:  # a full disk, a folder that may not be written
        where, why = getattr(error, "filename", None), getattr(error, "strerror", None)
        print(f"error: {where or 'a file'}: {why or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "stopped; features computed for whole passes are kept, results of unfinished protocols are not",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
