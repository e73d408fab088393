"""A run on several indexes: everything that reads one reads a mix."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from hybridssl import run
from pretrain import data, fingerprint
from pretrain.columns import columns
from pretrain.command import load
from pretrain.loop import main
from pretrain.probe import InLoopProbe
from shards import demo
from shards.mix import open_sets
from shards.stream import Order
from tests.pretrain.conftest import TINY


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("second") / "demo"
    demo.generate(folder, samples=60, seed=5, size=48)
    return folder


@pytest.fixture
def both(index: Path, second: Path) -> list[str]:
    return [*TINY, f"data.train={index},{second}"]


@pytest.mark.parametrize("form", ["{a},{b}", "[{a}, {b}]", "{a}, {b}"])
def test_several_sets_can_be_named(form: str, index: Path, second: Path) -> None:
    recipe = load([*TINY, "out=x", "data.train=" + form.format(a=index, b=second)])
    assert recipe.data.sets == (str(index), str(second))
    assert recipe.data.open().sha256 == open_sets([str(index), str(second)]).sha256


@pytest.mark.parametrize("asked", ["", "stream.weights=[1,2]", "stream.labelled_fraction=0.5", "stream.temperature=3"])
def test_label_counts_are_those_of_the_stream(asked: str, both: list[str]) -> None:
    recipe = load([*both, "out=x", "stream.labelled_fraction=0", *([asked] if asked else [])])
    mix = recipe.data.open()
    chosen = mix.select(recipe.data.splits)
    order, rounds = Order(mix, chosen, recipe.stream, seed=0), 40
    drawn = np.array([order(p)[1] for p in range(rounds * len(chosen))])
    source, label = mix.column("source")[drawn], mix.column("label")[drawn]
    counts = np.zeros((len(mix.sources), len(mix.classes)))
    np.add.at(counts, (source[label >= 0], label[label >= 0]), 1 / rounds)
    np.testing.assert_allclose(data.label_counts(recipe, mix), counts, atol=0.35)


def test_a_weight_for_each_set(both: list[str], capsys) -> None:
    assert main([*both, "out=x", "stream.weights=[1,2,3]"]) == 2
    assert "stream.weights has 3 numbers for 2 sets" in capsys.readouterr().err


def test_what_reads_one_index_reads_a_mix(both: list[str]) -> None:
    recipe = load([*both, "out=x", "stream.weights=[3,1]", "stream.labelled_fraction=0"])
    mix = recipe.data.open()
    order = Order(mix, mix.select(recipe.data.splits), recipe.stream, recipe.seed)
    for step, batch in enumerate(islice(data.loader(recipe, mix, False, 8, 0, 0, 1), 5)):
        drawn = [order(position)[1] for position in range(8 * step, 8 * step + 8)]
        assert batch.keys == [mix.key(number) for number in drawn]
        assert sum(number >= mix.bounds[1] for number in drawn) == 2
    assert columns(load([*both, "out=x", "objectives.guide.columns={age: keep}"]), mix)[0].std > 0
    assert fingerprint.data(mix, ("train", "")).images == len(mix.select())
    assert InLoopProbe(recipe, mix).home.useful


def test_each_set_of_a_mix_may_have_its_audit(both: list[str], index: Path, second: Path, tmp_path: Path) -> None:
    names, dropped = [], set()
    for root in (second, index):
        one = open_sets(str(root))
        drop, leak = (one.key(int(i)) for i in one.select(("train", ""))[[2, 9]])
        about = {"name": root.name, "sha256": one.sha256, "samples": len(one)}
        document = {"format": "hybridssl-audit", "version": 1, "index": about, "drop": [drop], "leaks": [leak]}
        names.append(tmp_path / f"{root.parent.name}.json")
        names[-1].write_text(json.dumps(document))
        dropped |= {drop, leak}
    recipe = load([*both, "out=x", "stream.labelled_fraction=0"])
    mix = recipe.data.open()
    whole = data.selected(recipe, mix)
    for some, count in ((names, 4), (names[:1], 2)):
        asked = "stream.exclude=" + ",".join(map(str, some))
        recipe = load([*both, "out=x", "stream.labelled_fraction=0", asked])
        chosen = data.selected(recipe, mix)
        assert len(chosen) == len(whole) - count
        read = islice(data.loader(recipe, mix, False, 8, 0, 0, 1), 2 * len(chosen) // 8)
        keys = {key for batch in read for key in batch.keys}
        assert len(keys & dropped) == 4 - count
        assert keys >= {mix.key(int(i)) for i in chosen[:5]}


def test_a_run_on_a_mix_goes_on_and_reports(both: list[str], index: Path, second: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    assert main([*both, f"out={out}", "steps=2", "stream.weights=[1,1]", "probe.every=2"]) == 0
    state, mix = run.read_state(out), open_sets([str(index), str(second)])
    assert state["data"]["index"] == [str(index), str(second)]
    assert state["data"]["index_sha256"] == mix.sha256
    assert state["data"]["samples"] == len(mix.select())
    digests = load_file(out / "pretraining.safetensors")["digest"]
    assert np.array_equal(digests, mix.column("digest")[mix.select()])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Nearest neighbours" in page
    assert any("probe/knn" in json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert main([*both, f"out={out}", "steps=2", "stream.weights=[1,2]", "probe.every=2"]) == 2
    assert "stream.weights" in capsys.readouterr().err
