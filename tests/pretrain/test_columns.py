"""Columns of the table on their way into a batch, and how often the stream shows each class."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain import data
from pretrain.columns import columns
from pretrain.command import load
from pretrain.loop import main
from shards.index import Index
from shards.stream import Order
from tests.pretrain.conftest import losses

GUIDE = "objectives.guide.columns={age: keep, source: remove, localization: keep prototypes}"


def test_kinds_are_found_or_asked_for(tiny: list[str]) -> None:
    recipe = load(
        [*tiny, "out=x", "objectives.guide.columns={age: keep, source: remove, skin_tone: keep, sex: remove}"]
    )
    index = Index.open(recipe.data.train)
    found = {column.name: column for column in columns(recipe, index)}
    ages = [index.read(int(i)).meta["age"] for i in index.select()]
    assert (found["age"].mean, found["age"].std) == pytest.approx((np.mean(ages), np.std(ages)))
    assert found["age"].values == ()
    assert found["source"].values == index.sources
    assert set(found["skin_tone"].values) <= {"I", "II", "III", "IV", "V", "VI"}
    assert found["sex"].values == ("female", "male")
    recipe = load([*tiny, "out=x", "objectives.guide.columns={age: keep class}"])
    assert columns(recipe, index)[0].values == tuple(sorted({str(age) for age in ages}))
    assert columns(load([*tiny, "out=x"]), index) == ()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("{ages: keep}", ["'ages'", "did you mean 'age'?", "localization", "source"]),
        ("{synthetic: keep}", ["'synthetic'", "'True' throughout"]),
        ("{sex: keep number}", ["'sex'", "not of numbers"]),
        ("{sex: hold}", ["objectives.guide.columns", "keep"]),
        ("{}", ["objectives.guide.columns is empty"]),
    ],
)
def test_a_column_that_does_not_serve_is_named(asked: str, words: list[str], tiny, tmp_path: Path, capsys) -> None:
    out = tmp_path / "bad"
    assert main([*tiny, f"out={out}", f"objectives.guide.columns={asked}"]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)
    assert not out.exists()


def test_batches_carry_the_values_of_their_images(tiny: list[str]) -> None:
    recipe = load([*tiny, "out=x", GUIDE])
    index = Index.open(recipe.data.train)
    wanted = columns(recipe, index)
    by_key = {index.key(int(i)): index.read(int(i)) for i in index.select()}
    for batch in islice(data.loader(recipe, index, False, 8, 0, 0, 1), 3):
        for key, row in zip(batch.keys, batch.meta, strict=True):
            sample = by_key[key]
            assert row[0] == pytest.approx((sample.meta["age"] - wanted[0].mean) / wanted[0].std)
            assert wanted[1].values[int(row[1])] == sample.source
            assert wanted[2].values[int(row[2])] == sample.meta["localization"]
    plain = next(iter(data.loader(load([*tiny, "out=x"]), index, False, 8, 0, 0, 1)))
    assert plain.meta is None


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_label_counts_are_those_of_the_stream(fraction: float, tiny: list[str]) -> None:
    recipe = load([*tiny, "out=x", f"stream.labelled_fraction={fraction}"])
    index = Index.open(recipe.data.train)
    chosen = index.select(recipe.data.splits)
    order = Order(index, chosen, recipe.stream, seed=0)
    rounds = 60
    drawn = np.array([order(p)[1] for p in range(rounds * len(chosen))])
    source, label = index.column("source")[drawn], index.column("label")[drawn]
    counts = np.zeros((len(index.sources), len(index.classes)))
    np.add.at(counts, (source[label >= 0], label[label >= 0]), 1 / rounds)
    np.testing.assert_allclose(data.label_counts(recipe, index), counts, atol=0.35)


def test_a_guided_run_is_the_same_in_micro_batches(tiny: list[str], tmp_path: Path) -> None:
    """With all else that this recipe can ask of labels: ancestors, priors, pseudo-labels, a projection."""
    index = Index.open(load([*tiny, "out=x"]).data.train)
    tree = tmp_path / "ontology.csv"
    kinds = [(name, "pigmented" if i % 2 else "other") for i, name in enumerate(index.classes)]
    tree.write_text("name,parents\n" + "".join(f"{name},{parent}\n" for name, parent in kinds))
    labels = f"objectives.labels={{ontology: {tree}, adjust: true, pseudo_above: 0.6, head: mlp}}"
    arguments = [*tiny, GUIDE, labels, "objectives.ibot=null", "objectives.spread=null", "steps=2"]
    arguments += ["stream.labelled_fraction=0.25", "teacher.momentum=[0.5, 0.5]"]
    for name, micro in (("whole", 0), ("micro", 2)):
        assert main([*arguments, f"batch.micro={micro}", f"out={tmp_path / name}"]) == 0
    whole, micro = losses(tmp_path / "whole"), losses(tmp_path / "micro")
    wanted = {"loss/guide/age", "loss/guide/source", "loss/guide/localization", "loss/labels", "loss/labels/pseudo"}
    assert wanted <= whole[0].keys()
    for left, right in zip(whole, micro, strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-4)
    line = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < line["health/pseudo_labelled"] <= 1
    assert "Labelled by the teacher" in (tmp_path / "whole" / "report.html").read_text()
    assert torch.isfinite(torch.tensor(list(whole[1].values()))).all()
