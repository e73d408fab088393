"""HAM10000 on two CPU cores: does `recipe=ham-cpu` beat what costs nothing, and what do labels add?

    python -m benchmarks.ham                      # cached arm by arm; about 3 hours on 2 cores

Arms: the recipe as it stands (hybrid), without labels (ssl), the labels alone (labels); beside them random weights of
the same backbone and a colour histogram with a thumbnail. All pretraining sees the train split with 10 % of its labels
(whole lesions). Protocols: kNN and linear probe with all labels and with the same 10 %, intervals over lesions. What
saw no label is judged on five draws of 10 % too: one of 706 images is a lottery. What saw labels would be given more.
Its runs are those of `benchmarks.budget --size cpu`, which can train them one by one. Data and work folder:
benchmarks/sets.py. Results: benchmarks/results/ham-cpu.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks import arms, sets
from benchmarks.common import drawn, machine, write_results
from finetune.results import Result, find

ARMS = {"hybrid": arms.RECIPE, "ssl": "ssl-pixels", "labels": "labels"}  # as benchmarks/arms.py calls them
DRAWS = {"1": [0], "0.1": [0], "0.1x5": [0, 1, 2, 3, 4]}  # folder -> seeds of the draws of labels
UNLABELLED = ("ssl", "random", "histogram")
PROTOCOLS = {"knn": ["knn"], "probe": ["logistic", "linear"]}  # by verb
PAIRS = [("hybrid", "random"), ("hybrid", "histogram"), ("hybrid", "ssl"), ("hybrid", "labels")]
PAIRS += [("ssl", "random"), ("ssl", "histogram"), ("labels", "histogram")]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    work = sets.work_folder()
    full = sets.ham_index(work)
    runs = {arm: str(arms.train(work, "cpu", name)) for arm, name in ARMS.items()}
    specs = {**runs, "random": f"random:{runs['ssl']}", "histogram": "histogram"}
    for share, seeds in DRAWS.items():
        for name in UNLABELLED if len(seeds) > 1 else specs:
            for verb, protocols in PROTOCOLS.items():
                out = work / "results" / f"{name}-{share}"
                options = ["--labels", share.partition("x")[0], "--seeds", *seeds]
                if not sets.judged(specs[name], *(out / protocol for protocol in protocols)):
                    sets.finetune(verb, specs[name], full, out, *options)
    results = {r.path.parent.relative_to((work / "results").resolve()).parts: r for r in find([work / "results"])}
    document = {
        "metrics": {" ".join(key): result.about["metrics"] for key, result in results.items()},
        "selected": {" ".join(key): result.about["selected"] for key, result in results.items()},
        "differences": dict(differences(results)),
        "runs": {arm: last_lines(Path(run)) for arm, run in runs.items()},
    }
    write_results("ham-cpu.json", {**machine(), "command": "python -m benchmarks.ham", **document})


def differences(results: dict[tuple[str, ...], Result]) -> Iterator[tuple[str, dict]]:
    """Balanced accuracy of one arm minus another on the same test images, with 95 % intervals over lesions."""
    for (folder, protocol), result in results.items():
        arm, share = folder.rsplit("-", 1)
        for other in (b for a, b in PAIRS if a == arm):
            gap = drawn(result) - drawn(results[f"{other}-{share}", protocol])
            yield f"{arm} - {other}, {protocol}, labels {share}", vars(gap.interval)


def last_lines(run: Path) -> dict:
    """The last logged step and the last in-loop probe of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = next(line for line in reversed(lines) if "seconds" in line)
    probe = next((line for line in reversed(lines) if "probe/knn" in line), {})
    return {k: v for k, v in (step | probe).items() if not k.startswith("health/max")}


if __name__ == "__main__":
    main()
