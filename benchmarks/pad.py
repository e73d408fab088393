"""HAM10000 -> PAD-UFES-20: what do dermatoscopy heads lose on smartphone photographs, and who pays for it?

    python -m benchmarks.pad histogram random=random:models/derm-s models/derm-s dinov2=timm:vit_small_patch14_dinov2

For every backbone, given as NAME=SPEC, or as a spec whose last part is its name:

- `crossdomain --to`: heads taught on HAM10000, judged on PAD-UFES-20 and back, among the five shared diagnoses
  (nv=NEV, bcc=BCC, mel=MEL; akiec~ACK and bkl~SEK, which are near and not equal), against heads taught at home.
- `fair --by fitzpatrick`: a probe taught on PAD-UFES-20; malignant (BCC, MEL, SCC) against benign in Fitzpatrick I-II
  and III-VI.

Then, between backbones: what the HAM head reaches on PAD, as paired differences over the same patients, with p-values
adjusted for their number (Holm). PAD has 172 test images, 6 of them melanoma: expect wide intervals.
Data and work folder: benchmarks/sets.py. Results: benchmarks/results/pad.json.
"""

from __future__ import annotations

import argparse
import math
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks import sets
from benchmarks.common import machine, write_results
from finetune import results
from finetune.metrics import balanced_accuracy
from finetune.resample import enough, holm, resample
from finetune.results import Result
from shards.index import Index

Array = np.ndarray
SHARED = ("nv=NEV", "bcc=BCC", "mel=MEL", "akiec=ACK", "bkl=SEK")
MALIGNANT = ("BCC", "MEL", "SCC")
TONES = {"I-II": "12", "III-VI": "3456"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="+", metavar="NAME=SPEC", help="as --backbone of `python -m finetune`")
    parser.add_argument("--methods", nargs="+", default=["logistic", "knn"], help="heads of crossdomain")
    args = parser.parse_args()
    specs = sets.named(args.backbones)
    work = sets.work_folder()
    full, pad = sets.ham_index(work), sets.pad_index(work)
    merges = tones(Index.open(pad))
    crossed: dict[str, dict[str, Result]] = {method: {} for method in args.methods}
    fairness: dict[str, Result] = {}
    for name, spec in specs.items():
        out = work / "pad-results" / name
        sets.finetune("crossdomain", spec, full, out, "--to", pad, "--map", *SHARED, "--methods", *args.methods)
        sets.finetune("probe", spec, pad, out, "--methods", "logistic")
        judge = [out / "logistic", "--by", "fitzpatrick", "--merge", *merges, "--positive", *MALIGNANT, "--overwrite"]
        sets.call("finetune", "fair", *judge)
        for method in args.methods:
            crossed[method][name] = results.read(out / f"crossdomain-{sets.PAD}-{method}" / "results.json")
        fairness[name] = results.read(out / "fair-fitzpatrick-logistic" / "results.json")
    document = {
        "shift": {
            method: {name: report(result) for name, result in by_name.items()} for method, by_name in crossed.items()
        },
        "differences": {method: differences(by_name) for method, by_name in crossed.items()},
        "fitzpatrick": {name: report(result) for name, result in fairness.items()},
    }
    write_results("pad.json", {**machine(), "command": "python -m benchmarks.pad", **document})


def tones(index: Index) -> list[str]:
    """--merge rules for the skin types that the test images have: `fair` refuses a type that none has."""
    there = {index.read(int(n)).meta.get("fitzpatrick", "") for n in index.select(["test"])}
    return [f"{name}={','.join(t for t in types if t in there)}" for name, types in TONES.items()]


def report(result: Result) -> dict[str, Any]:
    """What a reader needs of one result; no path of this machine."""
    about = result.about
    return {name: about[name] for name in ("metrics", "detail", "notes", "leaks", "seeds") if name in about}


def differences(found: dict[str, Result]) -> list[dict[str, Any]]:
    """Balanced accuracy on PAD of heads taught on HAM: one backbone minus another, over the same patients."""
    if len(found) < 2:
        return []
    arrays = {name: result.predictions() for name, result in found.items()}
    one, about = next(iter(arrays.values())), next(iter(found.values())).about
    names = next(row for row in about["detail"]["held_out"] if row["domain"] == sets.PAD)["classes"]
    classes = np.array(sorted(list(about["data"]["classes"]).index(name) for name in names))
    judged = np.isin(one["to_y"], classes)
    y = np.searchsorted(classes, one["to_y"][judged])
    assert all(np.array_equal(a["to_number"], one["to_number"]) for a in arrays.values())

    def statistic(scores: Array) -> Any:
        return lambda weight: balanced_accuracy(y, scores[0, judged][:, classes], weight)

    draws = resample(
        {name: statistic(a["to_scores"]) for name, a in arrays.items()},
        one["to_group"][judged],
        enough(math.comb(len(found), 2)),
    )
    gaps = {(a, b): draws[a] - draws[b] for a, b in combinations(found, 2)}
    adjusted = holm([gap.p for gap in gaps.values()])
    return [
        {"a": a, "b": b, **vars(gap.interval), "p_holm": p}
        for ((a, b), gap), p in zip(gaps.items(), adjusted, strict=True)
    ]


if __name__ == "__main__":
    main()
