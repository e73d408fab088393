"""The options that verbs share, in groups: what is judged, the question, the machine."""

from __future__ import annotations

import argparse
from pathlib import Path

FORMS = "run or exported folder | timm:NAME | hf:ID | random:SPEC | histogram (the last two: null baselines)"


def add_arguments(parser: argparse.ArgumentParser, forms: str = FORMS) -> None:
    """The options of every protocol that judges a backbone on labels; forms: of backbones that it takes."""
    judged_arguments(parser, "index with labelled train and test (and val) splits", "DIR/PROTOCOL/results.json", forms)
    question = parser.add_argument_group("the question")
    add, what = question.add_argument, question.add_mutually_exclusive_group()
    add("--labels", type=float, default=1.0, metavar="F", help="share of the train labels, by whole groups (1.0)")
    add("--source", metavar="NAME", help="only images of this source of the index")
    add("--positive", nargs="+", default=[], metavar="CLASS", help="classes that count as disease: adds sensitivity")
    what.add_argument("--grades", nargs="+", metavar="CLASS", help="all classes in order: judge by quadratic kappa")
    what.add_argument("--multi-label", action="store_true", help="an image may have several labels: judge by AUROC")
    seeds = "draws of labels and of the optimiser; the first is random:SPEC's too (0)"
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help=seeds)
    add("--allow-leak", action="store_true", help="go on when evaluation images leak; the report says so in red")
    machine_arguments(parser)


def column_argument(parser: argparse.ArgumentParser) -> None:
    """Of protocols that can ask for another column than the label."""
    text = "a column of the table in place of the label: can site, or sex, be read off the features?"
    parser.add_argument("--column", metavar="NAME", help=text)


def judged_arguments(parser: argparse.ArgumentParser, data: str, result: str, forms: str = FORMS) -> None:
    """data: what --data is; result: what is written below --out."""
    add = parser.add_argument_group("what is judged").add_argument
    add("--backbone", required=True, metavar="SPEC", help=forms)
    add("--data", required=True, type=Path, metavar="DIR", help=data)
    add("--out", required=True, type=Path, metavar="DIR", help=f"where {result} goes")
    add("--overwrite", action="store_true", help="replace another result in --out")


def machine_arguments(parser: argparse.ArgumentParser) -> None:
    """How features are computed: of these, only --size changes a figure."""
    add = parser.add_argument_group("the machine").add_argument
    add("--size", type=int, metavar="PX", help="image size; default: the backbone's own")
    add("--batch", type=int, default=64, metavar="N", help="images a forward pass (64)")
    add("--workers", type=int, default=0, metavar="N", help="processes that decode images (0: none beside this one)")
    add("--device", default="auto", metavar="NAME", help="auto | cpu | cuda | cuda:1 | mps (auto)")
    add("--cache", type=Path, metavar="DIR", help="where features are kept (~/.cache/hybridssl/features)")
