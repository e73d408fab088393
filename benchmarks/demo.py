"""Keep the figures of `make demo`: reads results/demo and writes benchmarks/results/demo.json.

make demo && .venv/bin/python -m benchmarks.demo
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.common import drawn, machine, write_results
from finetune.results import find

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    results = {(r.path.parent.parent.name, r.protocol): r for r in find([ROOT / "results" / "demo"])}
    differences = {}
    for protocol in ("knn", "logistic"):
        for other in ("random", "histogram"):
            gap = drawn(results["ours", protocol]) - drawn(results[other, protocol])
            differences[f"ours - {other}, {protocol}"] = vars(gap.interval)
    lines = [json.loads(line) for line in (ROOT / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()]
    document = {
        "metrics": {" ".join(key): result.about["metrics"] for key, result in results.items()},
        "selected": {" ".join(key): result.about["selected"] for key, result in results.items()},
        "differences": differences,
        "last step": next(line for line in reversed(lines) if "seconds" in line),
    }
    write_results("demo.json", {**machine(), "command": "make demo && .venv/bin/python -m benchmarks.demo", **document})


if __name__ == "__main__":
    main()
