"""What README claims: its figures come from benchmarks/results, its picture and its recipes exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from pretrain import command, recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_interval_comes_from_a_results_file() -> None:
    written = re.findall(r"[+-]?\d?\.\d{3} \[[^\]]+\]", README)
    known = set()
    for name in ("demo", "ham-cpu"):
        document = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for metrics in document["metrics"].values():
            known |= {"{value:.3f} [{low:.3f}, {high:.3f}]".format(**row) for row in metrics.values()}
        known |= {"{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row) for row in document["differences"].values()}
    assert len(written) == 46
    assert set(written) <= known


def test_every_other_measured_figure_is_the_one_that_was_measured() -> None:
    results = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in (ROOT / "benchmarks/results").glob("*.json")}
    heads, memory, copies = results["heads"], results["heads"]["peak_gib"], results["audit"]["ham"]["against_groups"]
    faster = results["views"]["sides"]["1024"]["times_as_fast"]["ours, worker / lightly"]["median"]
    text = " ".join(README.split())
    assert f"{heads['tokens']:,} tokens and {heads['prototypes']:,} prototypes take" in text
    assert f"take {memory['ours']:.2f} GiB where the plain formulas take {memory['plain']:.2f}" in text
    assert f"costs {heads['time_over_plain']:.2f} x their time" in text
    assert f"{faster:.1f} times as fast as lightly's DINOTransform from a 1,024 px JPEG" in text
    assert f"found {copies['pairs']} pairs of copies, {copies['of_one_group']} of them known as one lesion" in text


def test_what_it_points_at_is_there() -> None:
    for path in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
    named = set(re.findall(r"^\| `([a-z0-9-]+)` \|", README, re.MULTILINE))
    assert named == set(recipe.names())
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([a-z-]+)", README)) <= set(targets)


def test_every_launch_is_a_recipe_that_loads() -> None:
    launches = [line for line in README.splitlines() if line.startswith("    accelerate launch pretrain ")]
    assert len(launches) == 3
    for line in launches:
        loaded = command.load(shlex.split(line)[3:])
        assert loaded.objectives
        assert loaded.out.startswith("runs/")
