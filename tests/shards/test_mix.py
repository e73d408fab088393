from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.build import BuildOptions, build
from shards.errors import DataError
from shards.index import Index
from shards.mix import Mix, open_sets
from shards.order import LABELLED_EPOCH, Rounds, Shares
from shards.stream import Order, StreamOptions
from tests.shards.test_stream import make

Build = Callable[..., Index]


@pytest.fixture
def other(tmp_path: Path, jpeg: Callable[..., bytes], write_table: Callable[..., Path]) -> Build:
    """Builds a second set, of 24 images in shards of 5: (label, source) of the i-th as `said` tells."""

    def make_set(name: str, said: Callable[[int], tuple[str, str]], **options: Any) -> Index:
        (tmp_path / name / "images").mkdir(parents=True)
        rows = []
        for i in range(24):
            (tmp_path / name / "images" / f"{name}{i:02d}.jpg").write_bytes(jpeg(1000 + i))
            label, source = said(i)
            rows.append({"path": f"{name}{i:02d}.jpg", "label": label, "source": source, "split": "train"})
        table = write_table(tmp_path / name / "labels.csv", rows)
        return build(
            tmp_path / name / "images", tmp_path / name / "set", table, BuildOptions(shard_size="5", **options)
        ).index

    return make_set


@pytest.fixture
def mix(index: Index, other: Build) -> Mix:
    """60 images of the sources a and b (no split), and 24 of b and c (train), a new class among them."""
    return Mix([index, other("more", lambda i: (("bcc", "nevus", "")[i % 3], "bc"[i % 2]))])


def test_a_mix_offers_what_its_members_do(mix: Mix, index: Index) -> None:
    second = mix.members[1]
    assert len(mix) == 84
    assert mix.classes == ("bcc", "melanoma", "nevus", "ulcer")
    assert mix.sources == ("a", "b", "c")
    assert mix.vocabulary == {"a": ["melanoma", "ulcer"], "b": ["bcc", "nevus"], "c": ["bcc", "nevus"]}
    assert mix.named().tolist() == [[False, True, False, True], [True, False, True, False], [True, False, True, False]]
    assert mix.select().tolist() == list(range(84))
    assert mix.select(["train"]).tolist() == list(range(60, 84))
    for i in (0, 7, 59, 60, 61, 83):
        owner, own = (index, i) if i < 60 else (second, i - 60)
        assert mix.read(i) == owner.read(own)
        assert (mix.key(i), mix.meta(i), mix.labels(i)) == (owner.key(own), owner.meta(own), owner.labels(own))
        sample, label = mix.read(i), mix.column("label")[i]
        assert (mix.classes[label] if label >= 0 else None) == (sample.labels[0] if sample.labels else None)
        assert mix.sources[mix.column("source")[i]] == sample.source
        assert mix.splits[mix.column("split")[i]] == sample.split
        assert mix.shard_of(i) == (f"{owner.root}/{owner.shard_of(own)[0]}", owner.shard_of(own)[1])
    assert np.array_equal(mix.column("digest"), np.concatenate([index.column("digest"), second.column("digest")]))
    assert mix.sha256 not in (index.sha256, second.sha256)
    assert pickle.loads(pickle.dumps(mix)).read(70) == mix.read(70)
    with pytest.raises(IndexError):
        mix.read(84)
    mix.verify()


def test_one_folder_is_an_index_and_two_are_a_mix(mix: Mix) -> None:
    roots = [str(member.root) for member in mix.members]
    assert type(open_sets(roots[0])) is type(open_sets(roots[:1])) is Index
    assert open_sets(roots).sha256 == mix.sha256
    assert open_sets(roots[::-1]).sha256 != mix.sha256  # another order of samples


def test_sets_that_do_not_go_together_are_named(index: Index, other: Build, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{index.root} and {index.root} are the same set.*stream.weights"):
        Mix([index, index])
    grey = other("grey", lambda i: ("", ""), channels=1)
    with pytest.raises(DataError, match=rf"{index.root} and {grey.root} have images of 3 and 1 channels"):
        Mix([index, grey])
    birds = other("birds", lambda i: ("duck", "a"))
    words = rf"{index.root} and {birds.root} both have a source 'a'.*melanoma, ulcer in the one and duck in the other"
    with pytest.raises(DataError, match=words):
        Mix([index, birds])


def test_nobody_called_two_sets_default(other: Build) -> None:
    """The same name for labels without a source is no statement, so one list must hold the other."""
    one = other("one", lambda i: (("x", "y")[i % 2], ""))
    two = other("two", lambda i: (("x", "z")[i % 2], ""))
    part = other("part", lambda i: ("x", ""))
    with pytest.raises(DataError, match="'default'"):
        Mix([one, two])
    assert Mix([one, part]).vocabulary == {"default": ["x", "y"]}


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any), data=st.data())
def test_shares_are_exact_in_every_aligned_block(weights: list[int], data: st.DataObject) -> None:
    total = sum(weights)
    shares = Shares([Fraction(weight, total) for weight in weights])
    size = total * data.draw(st.integers(1, 4))
    block = data.draw(st.integers(0, 10**9))
    places = [shares(place) for place in range(block * size, (block + 1) * size)]
    for which, weight in enumerate(weights):
        own = [place for at, place in places if at == which]
        before = block * size * weight // total
        assert own == list(range(before, before + size * weight // total))


def mixed(**options: Any) -> tuple[Any, Order]:
    """Three sets of 40, 10 and 30 samples; classes 0 and 1 in the first, 1 and 2 in the second, none in the third."""
    labels = [(0, 1, -1, -1)[i % 4] for i in range(40)] + [(1, 2)[i % 2] for i in range(10)] + [-1] * 30
    index = make([10, 20, 10, 5, 5, 30], labels, bounds=[0, 40, 50, 80])
    return index, Order(index, np.arange(80), StreamOptions(window=2, **options), seed=3)


def drawn(order: Order, count: int, start: int = 0) -> list[int]:
    return [order(position)[1] for position in range(start, start + count)]


def test_by_default_every_image_comes_as_often() -> None:
    _, order = mixed()
    for epoch in range(3):
        assert sorted(drawn(order, 80, 80 * epoch)) == list(range(80))
    for block in range(10):
        assert np.bincount(np.digitize(drawn(order, 8, 8 * block), [40, 50])).tolist() == [4, 1, 3]


def test_each_set_runs_its_own_order_and_epochs() -> None:
    _, order = mixed(weights=(1.0, 2.0, 1.0))
    seen = [order(position) for position in range(400)]
    alone = Order(make([10, 20, 10]), np.arange(40), StreamOptions(window=2), seed=3)
    assert [pair for pair in seen if pair[1] < 40] == [alone(position) for position in range(100)]
    second = [pair for pair in seen if 40 <= pair[1] < 50]
    assert len(second) == 200
    assert {epoch for epoch, _ in second} == set(range(20))
    assert all(n == 20 for n in Counter(number for _, number in second).values())


def test_weights_and_temperature() -> None:
    assert StreamOptions(weights=(0.7, 0.2, 0.1)).shares([1, 1, 1]) == [
        Fraction(7, 10),
        Fraction(1, 5),
        Fraction(1, 10),
    ]
    assert StreamOptions().shares([40, 10]) == [Fraction(4, 5), Fraction(1, 5)]
    assert StreamOptions(temperature=2).shares([400, 100]) == [Fraction(2, 3), Fraction(1, 3)]
    assert [float(s) for s in StreamOptions(temperature=1000).shares([10**6, 1])] == pytest.approx([0.5, 0.5], abs=0.01)
    with pytest.raises(DataError, match=r"stream.weights has 2 numbers for 3 sets"):
        mixed(weights=(1.0, 1.0))
    for bad in ({"weights": (1.0, 0.0)}, {"temperature": 0.5}, {"weights": (float("nan"),)}):
        with pytest.raises(DataError, match=next(iter(bad))):
            StreamOptions(**bad)


def test_labelled_slots_go_round_the_classes_of_all_sets() -> None:
    _, order = mixed(labelled_fraction=0.25, weights=(1.0, 1.0, 2.0))
    labels = mixed()[0].column("label")
    for block in range(12):
        seen = [order(position) for position in range(16 * block, 16 * block + 16)]
        slots = [number for epoch, number in seen if epoch >= LABELLED_EPOCH]
        others = [number for epoch, number in seen if epoch < LABELLED_EPOCH]
        assert len(slots) == 4
        assert np.bincount(np.digitize(others, [40, 50])).tolist() == [3, 3, 6]
    slots = [n for e, n in (order(p) for p in range(16 * 45)) if e >= LABELLED_EPOCH]
    assert Counter(int(labels[n]) for n in slots) == {0: 60, 1: 60, 2: 60}
    ones = [n for n in slots if labels[n] == 1]
    assert {n for n in ones if n >= 40} == {40, 42, 44, 46, 48}  # class 1 of both sets
    assert len(set(ones[:15])) == 15


def test_a_set_of_which_nothing_is_selected() -> None:
    index, _ = mixed()
    with pytest.raises(DataError, match="no sample of set 1 is selected"):
        Order(index, np.arange(40), StreamOptions())


def test_the_order_of_a_mix_never_changes() -> None:
    _, order = mixed(weights=(1.0, 2.0, 1.0), labelled_fraction=0.25)
    around = drawn(order, 12, 100)
    assert around == [mixed(weights=(1.0, 2.0, 1.0), labelled_fraction=0.25)[1](p)[1] for p in range(100, 112)]
    assert around == [24, 76, 44, 16, 41, 26, 57, 41, 49, 40, 7, 1]


@pytest.mark.parametrize("size", [64, 65, 135, 640])
def test_a_large_class_is_shuffled_in_parts(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.order.PART", 64)
    numbers, labels = np.arange(10, 10 + size), np.zeros(size, int)
    rounds = Rounds(numbers, labels, seed=0)
    seen = [rounds(place)[1] for place in range(2 * size)]
    assert sorted(seen[:size]) == sorted(seen[size:]) == numbers.tolist()
    assert seen[:size] != seen[size:]
    assert [Rounds(numbers, labels, seed=0)(place)[1] for place in (0, size // 2, size - 1)] == [
        seen[place] for place in (0, size // 2, size - 1)
    ]
