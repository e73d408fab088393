"""What README claims: its figures come from benchmarks/results, its picture and its recipes exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from pretrain import recipe
from shards import demo
from shards.draw import Photo
from tests.figures import RESULTS, budget_gap, ham_row, interval, read

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_interval_is_the_one_of_its_cell() -> None:
    columns = [(protocol, share) for protocol in ("knn", "logistic") for share in ("1", "0.1")]
    arms = ["`ham-cpu` (self-supervised + labels)", "the same without labels", "the labels alone", "random weights"]
    pairs = [f"hybrid - {other}" for other in ("random", "histogram", "self-supervised", "the labels alone")]
    names = [*arms, "colour histogram + thumbnail", *pairs, "self-supervised - histogram"]
    rows = [ham_row(name, columns) for name in names]
    document, protocols = read("demo"), ("knn", "logistic")
    backbones = {"ours": "the demo's backbone", "random": "random weights of the same backbone"}
    for arm, name in (backbones | {"histogram": "colour histogram + thumbnail"}).items():
        found = [interval(document["metrics"][f"{arm} {p}"]["balanced_accuracy"]) for p in protocols]
        rows.append(f"| {name} | {' | '.join(found)} |")
    for other in ("random", "histogram"):
        found = [interval(document["differences"][f"ours - {other}, {p}"], "+") for p in protocols]
        rows.append(f"| ours - {other} | {' | '.join(found)} |")
    written = [line for line in README.splitlines() if re.search(r"^\|.*\d\.\d{3} \[", line)]
    assert sorted(written) == sorted(rows)


def test_every_other_measured_figure_is_the_one_that_was_measured() -> None:
    results = {path.stem: read(path.stem) for path in RESULTS.glob("*.json")}
    heads, memory, copies = results["heads"], results["heads"]["peak_gib"], results["audit"]["ham"]["against_groups"]
    faster = results["views"]["sides"]["1024"]["times_as_fast"]["ours, worker / lightly"]["median"]
    text = " ".join(README.split())
    assert f"{heads['tokens']:,} tokens and {heads['prototypes']:,} prototypes take" in text
    assert f"take {memory['ours']:.2f} GiB where the plain formulas take {memory['plain']:.2f}" in text
    assert f"costs {heads['time_over_plain']:.2f} x their time" in text
    assert f"{faster:.1f} times as fast as lightly's DINOTransform from a 1,024 px JPEG" in text
    both = results["views"]["sides"]["1024"]["times_as_fast"]["ours, both / lightly"]["median"]
    assert f"with the colours on the same core {both:.1f} times" in text
    names = ("ours", "lightly's parts", "lightly-train")
    few, many = (
        [f"{one['contestants'][name]['over_floor']:.2f}" for name in names] for one in results["step-cpu"]["settings"]
    )
    assert f"takes {few[0]} x the bare passes of its backbone at 4,096 prototypes and {many[0]} x at 65,536" in text
    assert f"with lightly's parts {few[1]} and {many[1]}, as lightly-train's `dinov2` {few[2]} and {many[2]} (" in text
    few, many = (
        [f"{one['contestants'][name]['ours_over_it']:.2f}" for name in names[1:]]
        for one in results["endtoend-cpu"].values()
    )
    assert (
        f"ours makes {few[0]} times the images/s of lightly's parts and {few[1]} times those of lightly-train" in text
    )
    assert f"at 4,096 prototypes, {many[0]} and {many[1]} times at 65,536 (" in text
    assert f"took {round(results['demo']['last step']['seconds'] / 60)} minutes" in text
    soak = results["reliability"]["soak"]
    assert (soak["hours"], soak["different"], soak["lines_missing"]) == (2.0, [], 0)
    assert max(soak["growth"].values()) < 0.02
    assert f"a run that died {soak['deaths']} times" in text
    tried = results["reliability"]["fuzz"]
    assert f"{tried['inputs']:,} spoilt files and words" in text
    assert (len(tried["targets"]), tried["faults"]) == (12, [])
    assert f"found {copies['pairs']} pairs of copies, {copies['of_one_group']} of them known as one lesion" in text
    more = results["audit"]["ham"]["with_backbone"]["against_groups"]
    assert f"(`--backbone`) {more['pairs']}, of which {more['of_one_group']} are." in text
    assert {results["ham-cpu"]["runs"][arm]["images"] for arm in ("hybrid", "ssl")} == {416_000}
    assert "416,000 image presentations" in text
    draws = results["ham-cpu"]["differences"]["ssl - histogram, logistic, labels 0.1x5"]
    assert f"regression on 10 % of the labels over five draws of them: {interval(draws, '+')}" in text
    ssl, labels = (budget_gap("late, text prototypes", half) for half in ("no labels", "labels alone"))
    for figure in ("ham linear 10 %", "ham knn"):
        assert f"{ssl[figure]} and {labels[figure]}" in text
    assert f"nor was a gain on the mean over self-supervision, {ssl['composite']}." in text
    painted = "pixels, late, text prototypes"
    halves = [budget_gap(painted, half)["composite"] for half in ("pixels, no labels", "labels alone")]
    assert "gains {} over self-supervision and {} over the labels alone; less".format(*halves) in text
    assert f"less than {results['budget-cpu']['noise_threshold']:.3f} would be the chance of a seed" in text
    assert f"{budget_gap(painted, 'late, text prototypes')['composite']} for the pixels" in text
    adjusted = {frozenset((gap["a"], gap["b"])): gap["p_holm"] for gap in results["budget-cpu"]["differences"]}
    assert f"adjusted for all {len(adjusted)} pairs of arms" in text
    ours, less = "pixels-for-ibot", ("labels", "hybrid-late-text", "ssl-pixels")
    assert [round(adjusted[frozenset((ours, arm))], 2) for arm in less] == [0.01, 0.01, 1]
    gap = results["ham-cpu"]["differences"]["hybrid - ssl, logistic, labels 1"]
    assert f"where logistic regression is given all labels, {interval(gap, '+')}." in text
    assert [len(results["budget-cpu"]["by_seed"][arm]) for arm in ("ssl", "labels", "hybrid-late-text")] == [2, 2, 2]
    test = results["pad"]["shift"]["logistic"]["histogram"]["detail"]["domains"]["ham10000"]["test"]
    assert f"Balanced accuracy on {test:,} test images" in text


def test_the_demo_has_as_many_test_images_as_its_table_says(monkeypatch) -> None:
    blank = Photo(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), bool), "tan", "blob", ())
    monkeypatch.setattr(demo, "photograph", lambda *_: blank)  # what is drawn decides no split
    splits = [json.loads(row["json"])["split"] for row in demo._samples(1600, 0, 128, 0.5, lambda *_: None)]
    assert f"| balanced accuracy on {splits.count('test')} test images |" in README


def test_what_it_points_at_is_there() -> None:
    named = set(re.findall(r"^\| `([a-z0-9-]+)` \|", README, re.MULTILINE))
    assert named == set(recipe.names())
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([a-z-]+)", README)) <= set(targets)
