"""How much is lost when the photographs are worse: frozen features of corrupted test images, by the head of clean ones.

A head is fitted on clean train images, chosen on clean val images, and reads every test image clean and with each fault
(blur, noise, JPEG, colour cast, hair, ruler, exposure) at up to five severities. A drop is the clean figure minus the
corrupted one on the same images; its interval resamples patients or lesions. Faults are drawn (finetune/corruptions.py,
in the form of ImageNet-C, arXiv 1903.12261), the same for every backbone.

  python -m finetune robust --backbone models/derm-s --data data/derm --out results/derm-s
  python -m finetune robust ... --methods logistic knn --corruptions blur jpeg --severities 1 3 5

Writes OUT/robust-METHOD/results.json and report.html. All faults cost 35 passes over the test images; they are cached.
"""

from __future__ import annotations

import argparse
import difflib

import numpy as np

from finetune import heads, metrics, robust_page, task, written
from finetune.corruptions import NAMES, SEVERITIES, VERSION, change, names
from finetune.features import default_cache, extract
from finetune.metrics import Metric
from finetune.resample import GROUPS, Statistic, few_groups, mean, resample
from hybridssl.errors import UserError

Array = np.ndarray
Fault = tuple[str, int]  # a corruption and its severity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    heads.add_arguments(parser)
    add = parser.add_argument
    add("--corruptions", nargs="+", metavar="NAME", help=f"which faults ({' '.join(NAMES)})")
    add("--severities", nargs="+", type=int, choices=SEVERITIES, default=list(SEVERITIES), help="which (1 2 3 4 5)")


def run(args: argparse.Namespace) -> None:
    protocols = {method: f"robust-{method}" for method in args.methods}
    check(args.corruptions or [])
    work = task.prepare(args, list(protocols.values()))
    faults = [(name, s) for name in chosen(args.corruptions, work.index.channels) for s in sorted(set(args.severities))]
    x = {fault: corrupted(work, fault) for fault in faults}
    for method, protocol in protocols.items():
        judge(work, method, protocol, x)


def check(asked: list[str]) -> None:
    """UserError for a corruption that does not exist."""
    for name in asked:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1, 0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"--corruptions {name}: no such fault; {hint}There are {', '.join(NAMES)}")


def chosen(asked: list[str] | None, channels: int) -> list[str]:
    """The corruptions asked for, or all that images of so many channels can have. UserError when one cannot."""
    possible = names(channels)
    if asked and (cannot := [name for name in asked if name not in possible]):
        raise UserError(f"--corruptions {cannot[0]}: images of {channels} channel have no colour; leave it away")
    return list(dict.fromkeys(asked)) if asked else possible


def corrupted(work: task.Task, fault: Fault) -> dict[str, Array]:
    """kind -> [N, D] of the test images with one fault, in the order of `work.test`."""
    args, numbers = work.args, work.features.numbers[work.test]
    cache = args.cache or default_cache()
    found = extract(work.encoder, work.index, numbers, args.batch, args.workers, cache, change=change(*fault))
    assert np.array_equal(found.numbers, numbers)  # what decoded once decodes again
    return found.x


def judge(work: task.Task, method: str, protocol: str, x: dict[Fault, dict[str, Array]]) -> None:
    """Fit on clean images, score every fault, and write result and page."""
    test, count = work.test, len(work.classes)
    splits = [work.split(seed) for seed in work.args.seeds]
    fitted = [
        heads.fit(method, work.features.x, work.y, train, val, work.kind, count, seed)
        for seed, (train, val) in zip(work.args.seeds, splits, strict=True)
    ]
    clean = np.stack([head.predict(heads.take(work.features.x, test)) for head in fitted])  # [S, N, K]
    scores = {fault: np.stack([head.predict(values) for head in fitted]) for fault, values in x.items()}
    y, group = work.y[test], work.features.group[test]
    found = metrics.bootstrap(y, clean, group, work.kind.metrics)
    detail, drops = drops_of(y, clean, scores, group, work.kind.metrics[work.kind.select_by])
    detail = {"metric": work.kind.select_by, "method": method, "version": VERSION, **detail}
    detail["said"] = robust_page.said(detail, drops, few_groups(group, np.ones(len(group), bool), GROUPS))
    choices = [
        {"seed": seed, **head.choice, "val": round(head.val, 4)}
        for seed, head in zip(work.args.seeds, fitted, strict=True)
    ]
    used = {"train": [len(train) for train, _ in splits], "val": [len(val) for _, val in splits]}
    arrays = {"scores": clean.astype(np.float32), "y": y, "group": group, "number": work.features.numbers[test]}
    arrays |= {f"scores/{name}-{s}": values.astype(np.float32) for (name, s), values in scores.items()}
    for s, (_, val) in enumerate(splits):  # on which calibrate can set a temperature, as for any other result
        own = fitted[s].predict(heads.take(work.features.x, val)).astype(np.float32)
        arrays |= {f"val_scores_{s}": own, f"val_y_{s}": work.y[val]}
        arrays |= {f"val_group_{s}": work.features.group[val], f"val_number_{s}": work.features.numbers[val]}
    result = written.write(
        work,
        protocol,
        found | drops,
        {"grid": heads.weighed(heads.GRIDS[method], method, work.kind), "choices": choices},
        used,
        arrays,
        [
            *work.notes([train for train, _ in splits]),
            *task.rich_val(used),
            "the faults are drawn: a real camera's faults may cost more or less",
        ],
        detail=detail,
    )
    robust_page.page(result, work.index, int(work.features.numbers[test][0]), work.encoder.input_size)


def drops_of(
    y: Array, clean: Array, scores: dict[Fault, Array], group: Array, metric: Metric
) -> tuple[dict, dict[str, metrics.Interval]]:
    """Drops of `metric` from clean [S, N, K] to each of `scores`, all on the same resampled groups, means over seeds.

    Returns the detail rows, and the figures for the headline: the mean drop (the mean corruption error of ImageNet-C,
    section 4, as a difference and without a reference classifier) and the mean drop of every corruption.
    """

    def of(runs: Array) -> Statistic:
        return lambda weight: np.mean([metric(y, run, weight) for run in runs], axis=0)

    statistics = {"clean": of(clean), **{f"{name} {s}": of(values) for (name, s), values in scores.items()}}
    draws = resample(statistics, group, doing="resampling patients")
    drop = {fault: draws["clean"] - draws[f"{fault[0]} {fault[1]}"] for fault in scores}
    rows = [
        {
            "corruption": name,
            "severity": s,
            "value": heads.as_dict(draws[f"{name} {s}"].interval),
            "drop": heads.as_dict(drop[name, s].interval),
        }
        for name, s in scores
    ]
    by_name = {
        f"drop_{n}": mean([drop[f] for f in drop if f[0] == n]).interval for n in dict.fromkeys(n for n, _ in drop)
    }
    found = {"mean_drop": mean(list(drop.values())).interval, **by_name}
    return {"clean": heads.as_dict(draws["clean"].interval), "rows": rows}, found
