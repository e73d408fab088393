"""What was tried to break it, and what came of it: benchmarks/results/reliability.json, a section a kind of trial.

  python -m benchmarks.reliability fuzz --seconds 300

`fuzz` gives spoilt files and words to every reader (tests/security/fuzzing.py) and counts the inputs and the outcomes:
"read", "refused" (by an error of ours that names what is wrong), and faults, which should be none. Other programs add
their sections with `merge`.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections import Counter
from typing import Any

from benchmarks.common import RESULTS, machine, write_results
from tests.security.fuzzing import TARGETS, attempt

NAME = "reliability.json"
ROUND = 200  # inputs at a target before the next one has its turn


def merge(section: str, found: dict[str, Any], command: str) -> None:
    """Put one section into the file, with its command, machine and commit; the others stay as they are."""
    path = RESULTS / NAME
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_results(NAME, {**document, section: {**found, "command": command, **machine()}})


def fuzz(seconds: float) -> dict[str, Any]:
    """Rounds over all targets, each with another seed, until the time is up."""
    outcomes = {name: Counter[str]() for name in TARGETS}
    slowest, faults = dict.fromkeys(TARGETS, 0.0), []
    started, seed = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        for name in TARGETS:
            before = time.monotonic()
            try:
                outcomes[name] += attempt(name, ROUND, seed)
            except Exception as error:  # whatever a reader did not foresee is what is looked for
                outcomes[name]["fault"] += 1
                faults.append(f"{name}, seed {seed}: {type(error).__name__}: {str(error)[:200]}")
                print(faults[-1], flush=True)
            slowest[name] = max(slowest[name], time.monotonic() - before)
        seed += 1
    return {
        "inputs": sum(count.total() for count in outcomes.values()),
        "faults": faults,
        "targets": {
            name: {**dict(sorted(count.items())), "slowest_round_s": round(slowest[name], 1)}
            for name, count in outcomes.items()
        },
        "round": ROUND,
        "seeds": seed,
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "seconds": round(time.monotonic() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["fuzz"])
    parser.add_argument("--seconds", type=float, default=300.0, help="at least so long (default 300)")
    args = parser.parse_args()
    merge("fuzz", fuzz(args.seconds), f"python -m benchmarks.reliability fuzz --seconds {args.seconds:g}")


if __name__ == "__main__":
    main()
