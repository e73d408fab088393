"""What does each part of the method bring, for a fixed number of image presentations? HAM10000, from scratch.

    python -m benchmarks.budget --size quick                 # a few minutes an arm on 2 cores: nothing broke
    python -m benchmarks.budget --size cpu                   # the four main arms, one seed: the proof without a GPU
    python -m benchmarks.budget --size cpu --seconds         # time to quality: what saves time, and what it costs
    python -m benchmarks.budget --size gpu --arms all --seeds 0 1 2

An arm is a backbone pretrained with one set of objectives on the train split, of whose labels it may see `--labels`
(a tenth). All arms of a size see the same number of images; `ssl-brief` fewer, `labels` only the labelled ones among
them, a quarter. Each is judged frozen, on seven figures:

- HAM10000 test: balanced accuracy of kNN, of a linear probe with all labels, and of one with 10 %;
- PAD-UFES-20 test, a hospital that no arm has seen: the same three;
- HAM10000 test: IoU of a linear head on the patches against the lesion masks.

Their mean is the composite. Differences between arms are paired over lesions and patients, p-values adjusted for
their number (Holm). With two seeds or more, the noise threshold is twice the standard deviation of the composite
between seeds: a smaller difference is not shown. Beside it stand the seconds and the images of each arm's training:
`--seconds` is for arms that show as many images in less time (`ssl-curriculum`, `ssl-left-out`, `ssl-faster`) or
fewer of them in as little (`ssl-brief`). Only arms that had the machine alike can be compared so. Everything is
cached, so an interrupted benchmark goes on where it was; arms that were never run are not in the results. Data and
work folder: sets.py. Results: benchmarks/results/budget-SIZE.json (budget-SIZE-labels-F.json for another share of the
labels, -seconds.json).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import arms, sets
from benchmarks.common import drawn, machine, write_results
from finetune.resample import Draws, enough, holm, resample
from finetune.results import Result, read
from pretrain.journal import Journal

Array = np.ndarray
# figure -> where its results.json is below an arm's folder
FIGURES = {
    "ham knn": "ham-1/knn",
    "ham linear": "ham-1/logistic",
    "ham linear 10 %": f"ham-{arms.PROBE_LABELS:g}/logistic",
    "pad knn": "pad-1/knn",
    "pad linear": "pad-1/logistic",
    "pad linear 10 %": f"pad-{arms.PROBE_LABELS:g}/logistic",
    "ham mask IoU": "masks/segment_linear",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=arms.SIZES, required=True)
    choices, default = ["all", "random", *arms.ARMS], f"those to train and judge; default: {' '.join(arms.MAIN)}"
    parser.add_argument("--arms", nargs="+", choices=choices, metavar="ARM", help=default)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--labels", type=float, default=0.1, help="share of the train labels that an arm sees (0.1)")
    parser.add_argument(
        "--seconds", action="store_true", help=f"time to quality; arms by default: {' '.join(arms.SECONDS)}"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a run; 0: all cores")
    parser.add_argument("--train-only", action="store_true", help="pretrain, and judge another time")
    args = parser.parse_args()
    family = arms.SECONDS if args.seconds else arms.PARTS
    chosen = args.arms or (arms.SECONDS if args.seconds else arms.MAIN)
    chosen = family if "all" in chosen else chosen
    if other := [arm for arm in chosen if arm not in family]:  # they would be trained, and not be in the results
        parser.error(f"{', '.join(other)}: {'leave out' if args.seconds else 'add'} --seconds")
    work = sets.work_folder()
    for seed in args.seeds:
        for arm in chosen:
            if arm != "random":
                arms.train(work, args.size, arm, seed, args.labels, args.threads)
    if args.train_only:
        return
    for seed in args.seeds:
        for arm in chosen:
            if arm != "random":
                base = arms.folder(work, args.size, args.labels, arm)
                judge(str(base / "runs" / f"{arm}-{seed}"), base / "results" / f"{arm}-{seed}", work)
    if "random" in chosen:  # one draw: another would bring other labels too, and the seeds of a run are not that
        out = arms.folder(work, args.size, args.labels, "random") / "results" / "random-0"
        judge(f"random:{arms.some_run(work, args.size)}", out, work)
    found = collect(work, args.size, args.labels, family)
    trained = training(work, args.size, args.labels, found)
    name = f"budget-{args.size}" + ("" if args.labels == 0.1 else f"-labels-{args.labels:g}")
    command = f"python -m benchmarks.budget --size {args.size} --labels {args.labels:g}"
    if args.seconds:
        name, command = f"{name}-seconds", f"{command} --seconds"
    command += f" --arms {' '.join(found)}"
    write_results(
        f"{name}.json", {**machine(), "command": command, "labels": args.labels, "training": trained, **table(found)}
    )


def judge(spec: str, out: Path, work: Path) -> None:
    """The seven figures of a backbone; those that are there already are kept."""
    indexes = {"ham": sets.ham_index(work), "pad": sets.pad_index(work)}
    for name, data in indexes.items():
        for share in (1.0, arms.PROBE_LABELS):
            folder, options = out / f"{name}-{share:g}", ["--labels", share]
            if share == 1 and not sets.judged(spec, folder / "knn"):
                sets.finetune("knn", spec, data, folder, *options)
            if not sets.judged(spec, folder / "logistic"):
                sets.finetune("probe", spec, data, folder, "--methods", "logistic", *options)
    if not sets.judged(spec, out / FIGURES["ham mask IoU"]):
        sets.finetune("segment", spec, indexes["ham"], out / "masks", "--heads", "linear", "--epochs", 5)


def collect(
    work: Path, size: str, labels: float, family: Sequence[str] = arms.PARTS
) -> dict[str, dict[int, dict[str, Result]]]:
    """arm -> seed -> figure -> result, of each of `family` that was judged whole."""
    found: dict[str, dict[int, dict[str, Result]]] = {}
    for arm in family:
        for path in sorted((arms.folder(work, size, labels, arm) / "results").glob(f"{arm}-[0-9]*")):
            files = {name: path / where / "results.json" for name, where in FIGURES.items()}
            if path.name.removeprefix(f"{arm}-").isdigit() and all(file.is_file() for file in files.values()):
                seed = int(path.name.removeprefix(f"{arm}-"))
                found.setdefault(arm, {})[seed] = {name: read(file) for name, file in files.items()}
    return found


def training(
    work: Path, size: str, labels: float, found: Mapping[str, Mapping[int, object]]
) -> dict[str, dict[str, dict[str, float]]]:
    """arm -> seed -> seconds and images of its pretraining, by its log and its trunk's. Random weights have none."""
    trained: dict[str, dict[str, dict[str, float]]] = {}
    for arm, seeds in found.items():
        for seed in seeds if arm != "random" else ():
            last = told(arms.folder(work, size, labels, arm) / "runs" / f"{arm}-{seed}")
            spent = 0.0
            if base := arms.trunk(arm, labels):
                spent = told(
                    arms.folder(work, size, arms.PROBE_LABELS, base) / "runs" / f"{base}-{seed}", arms.JOIN[size]
                )["seconds"]
            trained.setdefault(arm, {})[str(seed)] = {"seconds": last["seconds"] + spent, "images": last["images"]}
    return trained


def told(run: Path, until: float = math.inf) -> dict[str, float]:
    """The last line of a run's log up to a step."""
    lines = [line for line in Journal(run / "metrics.jsonl").lines() if "seconds" in line and line["step"] <= until]
    return max(lines, key=lambda line: line["step"])


def table(found: Mapping[str, Mapping[int, Mapping[str, Result]]]) -> dict[str, Any]:
    """Figures, composite, noise and differences of the arms, each the mean of its seeds; differences of those that both
    arms have."""
    count = enough(math.comb(len(found), 2))
    drawn = {arm: {seed: draws(results, count) for seed, results in seeds.items()} for arm, seeds in found.items()}
    by_seed = {arm: {s: {name: d.value for name, d in row.items()} for s, row in drawn[arm].items()} for arm in drawn}
    gaps = {(a, b): gap for a, b in combinations(drawn, 2) if (gap := difference(drawn[a], drawn[b]))}
    adjusted = holm([gap["composite"].p for gap in gaps.values()]) if gaps else []
    return {
        "arms": {
            arm: {name: vars(d.interval) for name, d in mean(list(seeds.values())).items()}
            for arm, seeds in drawn.items()
        },
        "by_seed": by_seed,
        "noise_threshold": threshold(
            {arm: [row["composite"] for row in seeds.values()] for arm, seeds in by_seed.items()}
        ),
        "differences": [
            {"a": a, "b": b, "p_holm": p, **{name: vars(d.interval) for name, d in gap.items()}}
            for ((a, b), gap), p in zip(gaps.items(), adjusted, strict=True)
        ],
    }


def draws(results: Mapping[str, Result], count: int) -> dict[str, Draws]:
    """Every figure of one backbone and their composite, each with `count` resamples: the same in all arms, so they can
    be subtracted."""
    figures = {name: one(name, result, count) for name, result in results.items()}
    return figures | {"composite": mean_of(figures)}


def difference(a: Mapping[int, Mapping[str, Draws]], b: Mapping[int, Mapping[str, Draws]]) -> dict[str, Draws]:
    """a - b by figure, over the seeds that both have: seeds differ by as much as arms do. Empty where there is none."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return {}
    one, other = mean([a[seed] for seed in seeds]), mean([b[seed] for seed in seeds])
    return {name: one[name] - other[name] for name in one}


def one(name: str, result: Result, count: int) -> Draws:
    arrays = result.predictions()
    if "iou" in arrays:
        values = arrays["iou"].mean(0)[:, 0].astype(np.float64)
        known = np.isfinite(values)
        return resample({name: lambda w: w @ values[known] / w.sum(1)}, arrays["group"][known], count)[name]
    return drawn(result, count)


def mean_of(figures: Mapping[str, Draws]) -> Draws:
    """The composite. Resamples of HAM and of PAD are independent, so any pairing of their draws is a joint draw."""
    return Draws(
        float(np.mean([d.value for d in figures.values()])), np.mean([d.drawn for d in figures.values()], axis=0)
    )


def mean(rows: Sequence[Mapping[str, Draws]]) -> dict[str, Draws]:
    return {name: mean_of({str(i): row[name] for i, row in enumerate(rows)}) for name in rows[0]}


def threshold(by_seed: Mapping[str, Sequence[float]]) -> float | None:
    """Twice the standard deviation between seeds, pooled over the arms that have several; None without any."""
    several = [values for values in by_seed.values() if len(values) > 1]
    if not several:
        return None
    squares: Iterator[float] = (float(np.sum((np.array(v) - np.mean(v)) ** 2)) for v in several)
    return 2 * float(np.sqrt(sum(squares) / sum(len(v) - 1 for v in several)))


if __name__ == "__main__":
    main()
