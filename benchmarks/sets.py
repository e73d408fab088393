"""The real sets of the benchmarks: tar -> shards; and the two doors that every benchmark goes through.

Data: HYBRIDSSL_DATA (default ../shared/data), which holds NAME.tar. Work folder: HYBRIDSSL_WORK (default a
folder in the system's temporary one). What is there already is used again.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.splits import label_subset
from hybridssl.recipe import read_yaml
from pretrain import command
from pretrain.recipe import changes
from shards.index import Index

ROOT = Path(__file__).resolve().parent.parent
ROLES = ("path", "label", "source", "group", "split", "mask")
HAM, PAD, NUCLEI = "ham10000", "pad_ufes20", "dsb2018_nuclei"
META = {HAM: ("domain", "age", "sex", "localization"), NUCLEI: ("domain", "n_nuclei")}
META[PAD] = (*META[HAM], "fitzpatrick", "biopsed")


def work_folder() -> Path:
    return Path(os.environ.get("HYBRIDSSL_WORK", Path(tempfile.gettempdir()) / "hybridssl-benchmarks"))


def ham_index(work: Path) -> Path:
    """HAM10000 with all labels and lesion masks, lesions as groups, in our 70/10/20 split."""
    return build(work, HAM, work / "ham")


def pad_index(work: Path) -> Path:
    """PAD-UFES-20, patients as groups."""
    return build(work, PAD, work / "pad")


def nuclei_index(work: Path) -> Path:
    """664 microscopy images with instance masks, each image a group of its own."""
    return build(work, NUCLEI, work / "nuclei")


def ham_with_labels(work: Path, share: float) -> Path:
    """HAM10000 where this share of the train labels is known, by whole lesions: those that `--labels` draws first."""
    out = work / f"ham-labels-{share:g}"
    if share == 1:
        return ham_index(work)
    index = Index.open(ham_index(work))
    train = index.select(("train",))
    keep = label_subset(index.column("label")[train], index.column("group")[train], share)
    kept = {index.read(int(i)).meta["path"] for i in train[keep]}
    return build(work, HAM, out, lambda row: row["split"] != "train" or Path(row["path"]).name in kept)


def build(work: Path, name: str, out: Path, labelled: Any = lambda row: True) -> Path:
    """Shards of the set `name`; rows that are not `labelled` lose their label."""
    if (out / "index.json").is_file():
        return out
    folder = work / name
    if not (folder / "labels.csv").is_file():
        data = Path(os.environ.get("HYBRIDSSL_DATA", ROOT.parent / "shared" / "data"))
        if not (data / f"{name}.tar").is_file():
            sys.exit(f"{name}.tar is not in {data}; HYBRIDSSL_DATA names the folder that holds it")
        work.mkdir(parents=True, exist_ok=True)
        with tarfile.open(data / f"{name}.tar") as tar:
            tar.extractall(work, filter="data")
    with open(folder / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    table = folder / f"{out.name}.csv"
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, (*ROLES, *META[name]), extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            label = row["label"] if labelled(row) else ""
            writer.writerow({**row, "path": Path(row["path"]).name, "source": name, "label": label})
    call("shards", "build", "--images", folder / "images", "--table", table, "--out", out, "--overwrite")
    return out


def pretrain(out: Path, data: Path, probe: Path, overrides: Iterable[str], threads: int = 0) -> None:
    """Run an arm, or go on with it; a finished one is left alone. threads: CPU threads, 0 for all cores.

    A run of another recipe ends the benchmark: its figures would stand under this one's name.
    """
    arguments = [f"data.train={data}", f"data.probe={probe}", f"out={out}", f"threads={threads}", *overrides]
    if (out / "report.html").is_file():
        if changed := changes(read_yaml(out / "recipe.yaml"), command.load(arguments), ("precision",)):
            told = "\n  ".join(changed)
            sys.exit(f"{out} is a run of another recipe:\n  {told}\nDelete it, or name another HYBRIDSSL_WORK")
        return
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # the recipe says the precision
    start = time.perf_counter()
    subprocess.run([*launch, "pretrain", *arguments], cwd=ROOT, check=True)
    print(f"{out.name}: {(time.perf_counter() - start) / 60:.1f} min", flush=True)


def judged(spec: str, *folders: Path) -> bool:
    """Whether results of `spec` are in all these folders, and none is older than the end of its run."""
    report = Path(spec.removeprefix("random:")) / "report.html"
    since = report.stat().st_mtime if report.is_file() else 0.0
    files = [folder / "results.json" for folder in folders]
    return all(file.is_file() and file.stat().st_mtime >= since for file in files)


def named(specs: Iterable[str]) -> dict[str, str]:
    """NAME=SPEC, or a spec whose last part is its name -> {name: spec}: results name no folder of this machine."""
    return dict(spec.split("=", 1) if "=" in spec else (Path(spec).name, spec) for spec in specs)


def finetune(verb: str, spec: str, data: Path, out: Path, *options: Any) -> None:
    call("finetune", verb, "--backbone", spec, "--data", data, "--out", out, "--overwrite", *options)


def call(module: str, *arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, check=True)
