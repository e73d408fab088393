"""Every verb of `python -m finetune` on real images, once: HAM10000, with PAD-UFES-20 as the other hospital.

    python -m benchmarks.clinic --backbone mine=models/mine                # 15 to 30 minutes on 2 cores
    python -m benchmarks.clinic --backbone mine=models/mine --only zeroshot robust

What a group does with a backbone of its own, in the order of the README, with the options that keep it short. It shows
that the verbs hold on real images, and what they say; it compares no methods (benchmarks/budget.py does). `zeroshot`
needs a label head that started from text, so a short run is made for it, which is told no vascular lesion: that class
has to be found by its words. benchmarks/nuclei.py has segmentation, benchmarks/pad.py the
shift to PAD-UFES-20 and skin types, benchmarks/selection.py the choice of images against random choice.
Data and work folder: benchmarks/sets.py; pages and results.json lie there in clinic/. Results:
benchmarks/results/clinic.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import arms, sets
from benchmarks.common import RESULTS, machine, write_results

# {me}: the backbone, {ham}, {pad}: indexes, {out}: where everything goes.
COMMON = "--backbone {me} --data {ham} --out {out} --overwrite"
STEPS = {
    "knn": f"knn {COMMON}",
    "probe": f"probe {COMMON} --positive akiec bcc mel",
    "probe random": "probe --backbone random:{me} --data {ham} --out {out}/random --methods logistic --overwrite",
    "fewshot": f"fewshot {COMMON} --shots 5 10",
    "zeroshot": "zeroshot --backbone {worded} --data {ham} --out {out} --overwrite",
    "retrieve": f"retrieve {COMMON}",
    "segment": f"segment {COMMON} --labels 0.1 --heads linear knn --epochs 5",
    "adapt": f"adapt {COMMON} --mode lora --labels 0.1 --epochs 4 --lr 0.001",
    "scaling": f"scaling {COMMON} --shares 0.01 0.1 1 --methods logistic knn --seeds 0 1",
    "crossdomain": f"crossdomain {COMMON} --by domain --methods logistic",
    "robust": f"robust {COMMON} --severities 1 3 5 --methods logistic",
    "fair": "fair {out}/logistic --by sex --out {out} --overwrite",
    "calibrate": "calibrate {out}/logistic --by domain --merge film=vidir_molemax,vienna_dias --out {out} --overwrite",
    "compare": "compare {out}/logistic {out}/random/logistic --out {out} --overwrite",
    "efficiency": f"efficiency {COMMON} --labels-counts 10 50",
    "explain": f"explain {COMMON} --result {{out}}/logistic --worst 3",
    "drift": "drift --backbone {me} --data {ham} --new {pad} --out {out} --overwrite",
    "select": "select --backbone {me} --data {tenth} --out {out} --overwrite --count 50",
    "report": "report {out}/knn {out}/logistic {out}/random --out {out}/report.html",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, metavar="NAME=SPEC", help="a run or an export")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="the rest is kept as it was")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of the training run; 0: all cores")
    args = parser.parse_args()
    ((name, spec),) = sets.named([args.backbone]).items()
    work = sets.work_folder()
    out = work / "clinic" / name
    places: dict[str, Any] = {"me": spec, "ham": sets.ham_index(work), "pad": sets.pad_index(work), "out": out}
    places["tenth"] = sets.ham_with_labels(work, 0.1)  # with images to choose from for `select`
    path = RESULTS / "clinic.json"
    steps: dict[str, Any] = json.loads(path.read_text())["steps"] if path.is_file() else {}
    for step in args.only:
        if step == "zeroshot":
            places["worded"] = worded(work, args.threads)
        began = time.time()
        sets.call("finetune", *(word.format(**places) for word in STEPS[step].split()))
        seconds = round(time.time() - began)
        steps[step] = {"seconds": seconds, "results": dict(since(out, began, {spec: name}))}
        steps = {known: steps[known] for known in STEPS if known in steps}
        write_results("clinic.json", {**machine(), "command": "python -m benchmarks.clinic", "steps": steps})


def worded(work: Path, threads: int) -> Path:
    """A short hybrid run whose classes have words, and of which one was never labelled."""
    labelled = lambda row: row["split"] != "train" or row["label"] != "vasc"  # noqa: E731
    data, out = sets.build(work, sets.HAM, work / "ham-without-vasc", labelled), work / "runs" / "worded"
    sets.pretrain(out, data, sets.ham_index(work), arms.overrides(work, "quick", "hybrid-text"), threads)
    return out


def since(out: Path, began: float, names: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(folder, metrics) of every results.json below `out` that is newer than `began`; specs by their `names`."""
    for path in sorted(out.rglob("results.json")):
        if path.stat().st_mtime >= began:
            text = path.read_text()
            for spec, name in names.items():
                text = text.replace(spec, name)
            yield str(path.parent.relative_to(out)), json.loads(text)["metrics"]


if __name__ == "__main__":
    main()
