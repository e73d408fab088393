from __future__ import annotations

import itertools
import json
import multiprocessing
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from shards.errors import DataError
from shards.format import Sample
from shards.index import Index
from shards.order import LABELLED_EPOCH, Epochs
from shards.stream import STAND_IN_EPOCH, Order, Positions, Quarantine, SampleDataset, StreamOptions


class Fake(SimpleNamespace):
    """What `Order` needs of an index: where shards start, and labels."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __str__(self) -> str:
        return "here"


def make(sizes: list[int], labels: list[int] | None = None, bounds: list[int] | None = None) -> Any:
    """`bounds`: where the samples of each set of a mix begin, and the end; they are starts of shards."""
    column = np.array([-1] * sum(sizes) if labels is None else labels, np.int32)
    bounds = bounds or [0, sum(sizes)]
    members = [f"set {i}" for i in range(len(bounds) - 1)]
    return Fake(starts=np.cumsum([0, *sizes]), bounds=bounds, members=members, column=lambda name: column)


def describe(sample: Sample, image: np.ndarray, position: int, epoch: int, number: int) -> tuple[Any, ...]:
    return position, epoch, number, sample.key, int(image.sum())


def identity(batch: list[Any]) -> list[Any]:
    return batch


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    window=st.integers(1, 14),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_every_sample_once_an_epoch(sizes: list[int], window: int, seed: int, data: st.DataObject) -> None:
    index = make(sizes)
    selected = data.draw(st.sets(st.integers(0, len(index) - 1), min_size=1))
    order = Order(index, np.array(sorted(selected)), StreamOptions(window=window), seed)
    assert len(order) == len(selected)
    for epoch in (0, 1, 5):
        seen = [order(epoch * len(order) + place) for place in range(len(order))]
        assert {e for e, _ in seen} == {epoch}
        assert sorted(number for _, number in seen) == sorted(selected)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0]))
def test_any_position_needs_no_other(position: int, share: float) -> None:
    index = make([5, 9, 3, 7], [i % 4 - 1 for i in range(24)])
    options = StreamOptions(window=2, labelled_fraction=share)
    walked = Order(index, np.arange(24), options)
    around = [walked(p) for p in range(max(0, position - 40), position + 1)]
    assert Order(index, np.arange(24), options)(position) == around[-1]


def test_shards_of_a_window_mix_and_others_do_not() -> None:
    order = Order(make([10] * 6), np.arange(60), StreamOptions(window=2))
    windows = [{order(p)[1] // 10 for p in range(start, start + 20)} for start in (0, 20, 40)]
    assert all(len(window) == 2 for window in windows)
    assert set.union(*windows) == set(range(6))
    first = [order(p)[1] // 10 for p in range(20)]
    assert first != sorted(first)
    assert first != sorted(first, reverse=True)


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = Order(make([10] * 4), np.arange(40), StreamOptions(), seed)
        return [order(number * 40 + p)[1] for p in range(40)]

    orders = [epoch(0, 0), epoch(0, 1), epoch(1, 0)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_every_epoch_draws_anew_both_the_shards_and_the_samples_inside_them() -> None:
    epochs = Epochs(np.arange(60), np.arange(0, 61, 10), window=1, seed=0)  # a shard of ten after the other
    first, second = (np.array([epochs(60 * e + i)[1] for i in range(60)]).reshape(6, 10) for e in range(2))
    assert (first[:, 0] // 10 != second[:, 0] // 10).any()
    assert (first % 10 != second % 10).any(axis=1).all()
    assert (np.sort(first % 10) == np.arange(10)).all()


def test_the_order_never_changes() -> None:
    """A run of last year resumes: these numbers may only change with the version of the run format."""
    order = Order(make([4, 3, 5], [0, 1, -1] * 4), np.arange(12), StreamOptions(window=2, labelled_fraction=0.25), 7)
    assert [order(p)[1] for p in range(16)] == [6, 5, 8, 3, 11, 10, 9, 4, 4, 7, 2, 7, 3, 1, 0, 0]


@pytest.mark.parametrize(("share", "size"), [(0.25, 16), (0.5, 6), (0.125, 64), (1.0, 4), (0.3, 10)])
def test_labelled_slots_are_exact_and_balanced(share: float, size: int) -> None:
    labels = [0] * 50 + [1] * 3 + [2] * 7 + [-1] * 140
    order = Order(make([20] * 10, labels), np.arange(200), StreamOptions(labelled_fraction=share))
    slots: list[int] = []
    for block in range(40):
        drawn = [order(p) for p in range(block * size, (block + 1) * size)]
        mine = [number for epoch, number in drawn if epoch >= LABELLED_EPOCH]
        assert len(mine) == round(share * size)
        slots += mine
    counts = Counter(labels[number] for number in slots)
    assert set(counts) == {0, 1, 2}
    assert max(counts.values()) - min(counts.values()) <= 1
    for kind in (1, 2):  # each class goes through all of its own before it repeats
        own = [number for number in slots if labels[number] == kind]
        n = labels.count(kind)
        assert all(len(set(own[i : i + n])) == n for i in range(0, len(own) - n + 1, n))


def test_the_other_slots_run_the_plain_order() -> None:
    labels = [i % 5 - 1 for i in range(50)]
    mixed = Order(make([10] * 5, labels), np.arange(50), StreamOptions(labelled_fraction=0.25))
    plain = Order(make([10] * 5, labels), np.arange(50), StreamOptions())
    rest = [mixed(p) for p in range(200) if mixed(p)[0] < LABELLED_EPOCH]
    assert rest == [plain(p) for p in range(150)]


def test_what_cannot_be_streamed() -> None:
    with pytest.raises(DataError, match="no selected sample of here has a label"):
        Order(make([4]), np.arange(4), StreamOptions(labelled_fraction=0.5))
    with pytest.raises(DataError, match="nothing to stream"):
        Order(make([4]), np.array([], int), StreamOptions())
    for bad in ({"window": 0}, {"labelled_fraction": 1.5}, {"max_bad_fraction": -0.1}):
        with pytest.raises(DataError, match=next(iter(bad))):
            StreamOptions(**bad)
    with pytest.raises(DataError, match="seed"):
        Order(make([4]), np.arange(4), StreamOptions(), seed=-1)


def batches(index: Index, workers: int, **where: int) -> Iterator[list[Any]]:
    order = Order(index, index.select(), StreamOptions(window=3, labelled_fraction=0.25))
    dataset = SampleDataset(index, order, describe, at_least=16)
    loader = DataLoader(dataset, batch_sampler=Positions(**where), num_workers=workers, collate_fn=identity)
    return iter(loader)


def test_the_scale_of_decoding_may_follow_the_position(index: Index) -> None:
    order = Order(index, index.select(), StreamOptions())
    asked = [16, 1]
    dataset = SampleDataset(index, order, lambda sample, image, *_: image.shape, at_least=asked.__getitem__)
    for position, at_least in enumerate(asked):
        expected = SampleDataset(index, order, lambda sample, image, *_: image.shape, at_least)[position]
        assert dataset[position] == expected
    assert dataset[0][0] != dataset[1][0]


def first(index: Index, count: int, workers: int = 0, **where: int) -> list[Any]:
    return [item for batch in itertools.islice(batches(index, workers, **where), count) for item in batch]


def test_workers_ranks_and_micro_batches_see_one_order(index: Index) -> None:
    whole = first(index, 10, size=16)
    assert [item[0][0] for item in whole] == list(range(160))
    assert first(index, 10, workers=1, size=16) == whole
    assert first(index, 10, workers=3, size=16) == whole
    assert first(index, 40, size=16, micro=4) == whole
    ranks = [first(index, 20, rank=rank, world=2, micro=4, size=16) for rank in (0, 1)]
    joined = [item for step in range(10) for rank in (0, 1) for item in ranks[rank][step * 8 : step * 8 + 8]]
    assert joined == whole
    assert first(index, 3, workers=3, size=16, start=7 * 16) == whole[7 * 16 :]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    parts=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=4
    ),
    start=st.integers(0, 100),
    window=st.integers(1, 5),
)
@example(sizes=[1], parts=[(3, 2, 1, 2)], start=0, window=8)  # one sample, and more readers than shards
@example(sizes=[1, 12], parts=[(2, 1, 2, 3), (3, 1, 1, 2), (1, 2, 3, 9)], start=5, window=1)
def test_stopping_and_going_on_with_others_loses_nothing(
    sizes: list[int], parts: list[tuple[int, int, int, int]], start: int, window: int
) -> None:
    """A run in parts, each (processes, workers, images a process, steps): every epoch holds each sample once."""
    index, selected = make(sizes), np.arange(sum(sizes))
    seen, at = [], start
    for world, workers, each, steps in parts:
        for step in range(steps):
            for rank in range(world):
                batches = itertools.islice(Positions(world * each, at, rank, world), step + 1)
                # as torch does: worker w reads every n-th batch, with an order of its own
                fresh = [pickle.loads(pickle.dumps(Order(index, selected, StreamOptions(window=window))))] * workers
                seen += [fresh[step % workers](position) for position in list(batches)[-1]]
        at += steps * world * each
    expected = Order(index, selected, StreamOptions(window=window))
    assert seen == [expected(position) for position in range(start, at)]
    by_epoch: dict[int, list[int]] = {}
    for epoch, number in seen:
        by_epoch.setdefault(epoch, []).append(number)
    for epoch, numbers in by_epoch.items():
        assert len(set(numbers)) == len(numbers)
        if epoch * len(selected) >= start and (epoch + 1) * len(selected) <= at:
            assert len(numbers) == len(selected)


def test_an_order_can_be_sent_to_a_spawned_process(index: Index) -> None:
    order = Order(index, index.select(), StreamOptions(labelled_fraction=0.5))
    here = [order(p) for p in range(8)]
    assert len(pickle.dumps(SampleDataset(index, order, describe))) < 20_000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(order, range(8)) == here


@pytest.mark.parametrize(
    "where",
    [{"size": 7, "world": 2}, {"size": 8, "world": 2, "micro": 3}, {"size": 8, "world": 2, "rank": 2}, {"size": 0}],
)
def test_batches_that_do_not_divide(where: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"divide|describe no batch"):
        Positions(**where)


@pytest.fixture
def damaged(index: Index, tmp_path: Path) -> tuple[Index, int]:
    """The index with one JPEG overwritten."""
    shutil.copytree(index.root, tmp_path / "set")
    copy, number = Index.open(tmp_path / "set"), 11
    name, offset = copy.shard_of(number)
    with (copy.root / name).open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff\xd8" + bytes(60))
    return copy, number


def test_a_damaged_sample_is_replaced_and_reported(damaged: tuple[Index, int]) -> None:
    index, number = damaged
    order = Order(index, index.select(), StreamOptions())
    dataset = SampleDataset(index, order, describe)
    position = next(p for p in range(60) if order(p)[1] == number)
    item, bad = dataset[position]
    epoch, stand_in = order(position + 1)
    assert item[:3] == (position, epoch + STAND_IN_EPOCH, stand_in)
    assert item == (*item[:3], *dataset[position + 1][0][3:])
    assert bad == [{"key": index.key(number), "shard": index.shard_of(number)[0], "reason": bad[0]["reason"]}]
    assert "damaged jpg" in bad[0]["reason"]
    assert all(not dataset[p][1] for p in range(60) if p != position)


def test_no_rank_waits_for_the_stand_in_of_another(damaged: tuple[Index, int]) -> None:
    """The other rank's batches are those of a sound set, and both have as many images as ever."""
    index, number = damaged
    order = Order(index, index.select(), StreamOptions())
    dataset = SampleDataset(index, order, describe)
    ranks = [list(itertools.islice(Positions(12, 0, rank, 2), 5)) for rank in (0, 1)]
    items = [[dataset[position] for batch in batches for position in batch] for batches in ranks]
    hit = [any(bad for _, bad in mine) for mine in items]
    assert sorted(hit) == [False, True]
    assert [len(mine) for mine in items] == [30, 30]
    sound = ranks[hit.index(False)]
    assert [item[2] for item, _ in items[hit.index(False)]] == [order(p)[1] for batch in sound for p in batch]
    assert number not in {item[2] for mine in items for item, _ in mine}


def test_an_endless_row_of_damage_stops(damaged: tuple[Index, int]) -> None:
    index, number = damaged
    dataset = SampleDataset(index, Order(index, np.array([number]), StreamOptions()), describe)
    with pytest.raises(DataError, match=rf"32 samples in a row cannot be read, the last {index.key(number)} in shard-"):
        dataset[0]


def test_quarantine_writes_once_and_stops_in_time(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    bad = [{"key": f"k{i}", "shard": "s.tar", "reason": "damaged"} for i in range(12)]
    quarantine = Quarantine(path, StreamOptions(max_bad_fraction=0.01), samples=5000)
    for _ in range(2):
        quarantine.add(bad[:2], 100)
    quarantine = Quarantine(path, StreamOptions(max_bad_fraction=0.01), samples=5000)
    quarantine.add(bad[1:10], 900)
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == [f"k{i}" for i in range(10)]
    with pytest.raises(DataError, match=r"11 damaged samples after 900 images"):
        quarantine.add(bad[:11], 900)
    quarantine.add(bad, 2000)


def test_the_processes_of_a_run_count_what_is_damaged_together(tmp_path: Path) -> None:
    bad = [{"key": f"k{i}", "shard": "s.tar", "reason": "damaged"} for i in range(11)]
    one, two = (Quarantine(tmp_path / "q.jsonl", StreamOptions(max_bad_fraction=0.01), samples=1000) for _ in range(2))
    one.add(bad[:6], 500)
    two.add(bad[5:10], 500)
    with pytest.raises(DataError, match=r"11 damaged samples"):
        one.add(bad[10:], 500)
