"""HAM10000 on two CPU cores: does `recipe=ham-cpu` beat what costs nothing, and what do labels add?

    python -m benchmarks.ham                      # everything, cached arm by arm; about 2 hours on 2 cores
    python -m benchmarks.ham --arms ssl --threads 1

Arms: the recipe as it stands (hybrid), without labels (ssl), the labels alone (labels); beside them random weights of
the same backbone and a colour histogram with a thumbnail. All pretraining sees the train split with 10 % of its labels
(whole lesions). Protocols: kNN and linear probe with all labels and with the same 10 %, intervals over lesions.
Data: HYBRIDSSL_DATA (default ../shared/data)/ham10000.tar. Work folder: HYBRIDSSL_WORK (default a folder in the
system's temporary one). Results: benchmarks/results/ham-cpu.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.common import machine, write_results
from finetune.metrics import paired_bootstrap
from finetune.results import Result, find
from finetune.splits import label_subset
from shards.index import Index

ROOT = Path(__file__).resolve().parent.parent
WITHOUT = ["objectives.labels=null", "stream.labelled_fraction=0"]
ALONE = ["objectives.dino=null", "objectives.ibot=null", "objectives.spread=null"]
# The labels alone see as many labelled images a step as the hybrid does (a quarter of 64), and nothing else.
ALONE += ["stream.labelled_fraction=1", "batch.size=16", "views.local_count=0"]
ARMS = {"hybrid": [], "ssl": WITHOUT, "labels": ALONE}
FRACTION = 0.1
SHARES = (1.0, FRACTION)
PROTOCOLS = {"knn": ["knn"], "probe": ["logistic", "linear"]}  # by verb
PAIRS = [("hybrid", "random"), ("hybrid", "histogram"), ("hybrid", "ssl"), ("hybrid", "labels")]
PAIRS += [("ssl", "random"), ("ssl", "histogram"), ("labels", "histogram")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--threads", type=int, default=2, help="of each run")
    parser.add_argument("--train-only", action="store_true", help="pretrain the arms and stop")
    args = parser.parse_args()
    work = Path(os.environ.get("HYBRIDSSL_WORK", Path(tempfile.gettempdir()) / "hybridssl-ham"))
    full, tenth = indexes(work)
    for arm in args.arms:
        pretrain(work / "runs" / arm, tenth, full, ARMS[arm], args.threads)
    if args.train_only:
        return
    runs = {arm: str(work / "runs" / arm) for arm in ARMS}
    specs = {**runs, "random": f"random:{runs['ssl']}", "histogram": "histogram"}
    for share in SHARES:
        for name, spec in specs.items():
            for verb, protocols in PROTOCOLS.items():
                out = work / "results" / f"{name}-{share:g}"
                if not all((out / protocol / "results.json").is_file() for protocol in protocols):
                    command = [sys.executable, "-m", "finetune", verb, "--backbone", spec, "--data", str(full)]
                    subprocess.run([*command, "--out", str(out), "--labels", str(share), "--overwrite"], check=True)
    results = {r.path.parent.relative_to((work / "results").resolve()).parts: r for r in find([work / "results"])}
    document = {
        "metrics": {" ".join(key): result.about["metrics"] for key, result in results.items()},
        "selected": {" ".join(key): result.about["selected"] for key, result in results.items()},
        "differences": dict(differences(results)),
        "runs": {arm: last_lines(work / "runs" / arm) for arm in ARMS},
    }
    write_results("ham-cpu.json", {**machine(), "command": "python -m benchmarks.ham", **document})


def indexes(work: Path) -> tuple[Path, Path]:
    """Shards of HAM10000 with all labels, and the same with 10 % of the train labels."""
    full, tenth = work / "all", work / "tenth"
    if not (tenth / "index.json").is_file():
        work.mkdir(parents=True, exist_ok=True)
        data = Path(os.environ.get("HYBRIDSSL_DATA", ROOT.parent / "shared" / "data"))
        with tarfile.open(data / "ham10000.tar") as tar:
            tar.extractall(work, filter="data")
        with open(work / "ham10000" / "labels.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        build(work, rows, full)
        index = Index.open(full)
        train = index.select(("train",))
        labels, groups = index.column("label")[train], index.column("group")[train]
        keep = label_subset(labels, groups, FRACTION)
        kept = {index.read(int(i)).meta["path"] for i in train[keep]}
        for row in rows:
            if row["split"] == "train" and Path(row["path"]).name not in kept:
                row["label"] = ""
        build(work, rows, tenth)
    return full, tenth


def build(work: Path, rows: list[dict], out: Path) -> None:
    columns = ["path", "label", "source", "group", "split", "domain", "age", "sex", "localization"]
    table = work / f"{out.name}.csv"
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "path": Path(row["path"]).name, "source": "ham10000"})
    images = str(work / "ham10000" / "images")
    command = [sys.executable, "-m", "shards", "build", "--images", images, "--table", str(table), "--out", str(out)]
    subprocess.run([*command, "--overwrite"], check=True)


def pretrain(out: Path, data: Path, probe: Path, overrides: list[str], threads: int) -> None:
    """Run an arm, or go on with it; a finished one is left alone."""
    if (out / "report.html").is_file():
        return
    command = ["accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", str(threads)]
    command += ["pretrain", "recipe=ham-cpu", f"data.train={data}", f"data.probe={probe}", f"out={out}"]
    command += [f"threads={threads}", *overrides]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    print(f"{out.name}: {(time.perf_counter() - start) / 60:.1f} min")


def differences(results: dict[tuple[str, ...], Result]) -> Iterator[tuple[str, dict]]:
    """Balanced accuracy of one arm minus another on the same test images, with 95 % intervals over lesions."""
    for (folder, protocol), result in results.items():
        arm, share = folder.rsplit("-", 1)
        for other in (b for a, b in PAIRS if a == arm):
            mine, theirs = result.predictions(), results[f"{other}-{share}", protocol].predictions()
            assert np.array_equal(mine["number"], theirs["number"])
            gap = paired_bootstrap(mine["y"], mine["scores"][0], theirs["scores"][0], mine["group"])
            yield f"{arm} - {other}, {protocol}, labels {share}", vars(gap)


def last_lines(run: Path) -> dict:
    """The last logged step and the last in-loop probe of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = next(line for line in reversed(lines) if "seconds" in line)
    probe = next((line for line in reversed(lines) if "probe/knn" in line), {})
    return {k: v for k, v in (step | probe).items() if not k.startswith("health/max")}


if __name__ == "__main__":
    main()
