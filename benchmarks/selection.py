"""Which images to label first: typiclust, coverage and uncertainty against random choice, on a labelled index.

    python -m benchmarks.selection --backbone models/derm-s --data data/ham10000 --count 200 --seeds 0 1 2 3 4

Takes the labels of the train split away, lets every strategy ask for `count` of them back (one image a lesion), fits
logistic regression on those and judges on test. Writes benchmarks/results/select.json: balanced accuracy, its
difference to random choice on the same test lesions (both as means over the seeds, 95 % over lesions), and how many
classes were found. Uncertainty begins with a quarter drawn at random (the first of random's own) and asks in three
rounds. C is chosen on the val split, with more labels than a clinic has then; that helps all alike.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import machine, write_results
from finetune import kinds, probe, strategies
from finetune.backbones import load
from finetune.features import Features, default_cache, extract
from finetune.metrics import Interval, balanced_accuracy, bootstrap
from finetune.strategies import Pick
from finetune.task import device_of
from shards.index import Index

Array = np.ndarray
ROUNDS = 3


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", required=True, metavar="SPEC")
    add("--data", required=True, type=Path, metavar="DIR", help="labelled index with train, val and test splits")
    add("--count", type=int, default=200)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--name", default="select.json", help="file in benchmarks/results (select.json)")
    add("--device", default="auto")
    args = parser.parse_args(arguments)
    index = Index.open(args.data)
    encoder = load(args.backbone, device=device_of(args.device))
    numbers = np.concatenate([index.select([split]) for split in ("train", "val", "test")])
    numbers = numbers[index.column("label")[numbers] >= 0]
    features = extract(encoder, index, numbers, cache=default_cache())
    found = simulate(features, args.count, args.seeds)
    document = {
        "backbone": {"name": Path(encoder.name).name, "sha256": encoder.sha256},
        "data": {"sha256": index.sha256, "images": len(features), "classes": list(index.classes)},
        "count": args.count,
        "seeds": args.seeds,
        "strategies": found,
        **machine(),
    }
    write_results(args.name, document)
    for name, row in found.items():
        ours, more = Interval(**row["balanced_accuracy"]), Interval(**row["minus_random"])
        print(f"{name:12} {ours}  minus random {more}  classes found {row['classes_found']:.1f}")
    return document


def simulate(features: Features, count: int, seeds: list[int]) -> dict[str, Any]:
    """strategy -> what a probe on the images that it asked for reaches on test."""
    splits = np.array(features.index.splits)[features.index.column("split")[features.numbers]]
    train, val, test = (np.flatnonzero(splits == name) for name in ("train", "val", "test"))
    y, classes = features.label, features.classes
    kind = kinds.choose("one-of", classes)
    scores: dict[str, list[Array]] = {}
    kept: dict[str, list[Array]] = {}
    for seed in seeds:
        for name in (*strategies.FROM_FEATURES, "uncertainty"):
            rows = asked(name, features, y, train, val, kind, count, seed)
            head = probe.fit(features.x, y, rows, val, kind, len(classes), seed)
            scores.setdefault(name, []).append(head.predict({k: x[test] for k, x in features.x.items()}))
            kept.setdefault(name, []).append(rows)
    group, k = features.group[test], len(classes)

    def difference(y: Array, both: Array, weight: Array) -> Array:
        return balanced_accuracy(y, both[:, :k], weight) - balanced_accuracy(y, both[:, k:], weight)

    out = {}
    for name, own in scores.items():
        value = bootstrap(y[test], np.stack(own), group, {"value": balanced_accuracy})["value"]
        pairs = np.concatenate([np.stack(own), np.stack(scores["random"])], axis=2)
        out[name] = {
            "balanced_accuracy": asdict(value),
            "minus_random": asdict(bootstrap(y[test], pairs, group, {"d": difference})["d"]),
            "by_seed": [kind.point(y[test], s) for s in own],
            "classes_found": float(np.mean([len(np.unique(y[rows])) for rows in kept[name]])),
        }
    return out


def asked(
    name: str, features: Features, y: Array, train: Array, val: Array, kind: kinds.Kind, count: int, seed: int
) -> Array:
    """Rows of the train split whose labels the strategy asks for."""
    x, group = features.x["cls"], features.group

    def ask(known: Array, choose: Any) -> Array:
        rest = np.setdiff1d(train, known)
        picks: list[Pick] = choose(strategies.pool_of(x[rest], group[rest], x[known], group[known]), rest)
        return np.concatenate([known, rest[[pick.row for pick in picks]]])

    none = np.zeros(0, dtype=np.int64)
    if name != "uncertainty":
        return ask(none, lambda pool, rest: strategies.FROM_FEATURES[name](pool, count, seed))
    known = ask(none, lambda pool, rest: strategies.random(pool, count // 4, seed))
    for step in range(1, ROUNDS + 1):
        target = count // 4 + (count - count // 4) * step // ROUNDS
        head = probe.fit(features.x, y, known, val, kind, len(features.classes), seed)

        def doubt(pool: strategies.Pool, rest: Array, head: probe.Head = head, more: int = target - len(known)) -> Any:
            said = head.predict({k: values[rest] for k, values in features.x.items()})
            return strategies.uncertainty(pool, more, said, features.classes, multi_label=False)

        known = ask(known, doubt)
    return known


if __name__ == "__main__":
    main()
