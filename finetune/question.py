"""Which question a labelled set asks: its kind, its classes, and its labels in terms of them. What it cannot ask is
refused here, before anything is fitted."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from finetune.columns import meta_column
from finetune.features import Features
from finetune.kinds import Kind, choose
from hybridssl.errors import UserError
from shards.index import Index

Array = np.ndarray
MANY = 100  # values of a column beyond which they are no classes


def labelled(index: Index, column: str | None = None) -> tuple[Array, tuple[str, ...]]:
    """int [N]: the class of each sample, -1 for none; and the classes: by the label, or by a column of the table.

    UserError for a column of more than MANY values: those of an age are no classes.
    """
    if column is None:
        return index.column("label"), index.classes
    values = meta_column(index, np.arange(len(index)), column)
    classes = tuple(sorted(set(values.tolist()) - {""}))
    if len(classes) > MANY:
        raise UserError(
            f"--column {column} has {len(classes):,} values in {index.root}, more than {MANY}: it takes classes, so "
            "group the values (ages by decade, say) in another column of the table"
        )
    numbers = {name: k for k, name in enumerate(classes)} | {"": -1}
    return np.array([numbers[value] for value in values.tolist()], dtype=np.int64), classes


def ask(
    args: argparse.Namespace, features: Features, named: Array, protocols: list[str]
) -> tuple[Kind, tuple[str, ...], Array]:
    """The kind of the set, the classes that occur, and the labels in terms of them: int64 [N], or uint8 [N, K].

    named: numbers of classes of other splits, which count as occurring. UserError for labels that do not fit the kind.
    """
    occurring = [int(k) for k in np.union1d(named, np.flatnonzero(features.y.any(0)))]
    if args.multi_label:
        all_known(features, occurring, "judge one source (--source NAME)")
    else:
        _one_each(features, protocols)
    if args.grades:
        names = [features.classes[k] for k in occurring]
        if sorted(names) != sorted(args.grades):
            raise UserError(f"--grades must name every class once, lowest first; the data has {', '.join(names)}")
        occurring = [features.classes.index(name) for name in args.grades]
    classes = tuple(features.classes[k] for k in occurring)
    name = "multi-label" if args.multi_label else "grades" if args.grades else "one-of"
    y = features.y[:, occurring]
    return choose(name, classes, args.positive), classes, y if args.multi_label else y.argmax(1)


def _one_each(features: Features, protocols: list[str]) -> None:
    """UserError where an image has several labels."""
    many = np.flatnonzero(features.y.sum(1) > 1)
    if len(many):
        raise UserError(
            f"{len(many):,} images have several labels (first: {features.index.key(int(features.numbers[many[0]]))}); "
            f"{', '.join(protocols)} takes them with --multi-label, or a --source with one label an image"
        )


def all_known(features: Features, occurring: Sequence[int], remedy: str) -> None:
    """UserError where a source cannot name a class: whether its images show it is unknown, and a metric or a loss that
    asks for every class would take it for absent."""
    able, lacking = features.index.named(), []
    for source in np.unique(features.source[features.source >= 0]):  # an image without a source may name every class
        missing = [features.classes[k] for k in occurring if not able[source, k]]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            lacking.append(f"{features.index.sources[source]} cannot name {', '.join(missing[:5])}{more}")
    if lacking:
        raise UserError(
            f"{features.index.root}: {'; '.join(lacking)}. An image may have several labels; one that is not there "
            f"counts as absent, and here it is unknown: {remedy}, or take an index whose sources name the same classes"
        )
