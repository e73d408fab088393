"""The batches of a run are the same for any number of workers and processes."""

from __future__ import annotations

import json
import re
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from hybridssl.types import Batch
from pretrain import data
from pretrain.command import load
from pretrain.loop import main
from shards.errors import DataError
from shards.index import Index


def batches(tiny: list[str], count: int, *extra: str, start: int = 0, rank: int = 0, world: int = 1) -> list[Batch]:
    recipe = load([*tiny, "out=x", *extra])
    index = Index.open(recipe.data.train)
    return list(islice(data.loader(recipe, index, True, 8, start, rank, world), count))


def same(a: Batch, b: Batch) -> bool:
    names = ("global_", "local", "clean", "clean_of", "colour", "masks", "labels", "source", "labelled")
    return a.keys == b.keys and all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(tiny: list[str], workers: int) -> None:
    alone = batches(tiny, 20)
    shared = batches(tiny, 20, f"data.workers={workers}")
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))
    assert len({key for batch in alone for key in batch.keys}) > 60


def test_two_processes_part_each_batch_between_them(tiny: list[str]) -> None:
    whole = batches(tiny, 6)
    parts = [batches(tiny, 6, rank=rank, world=2) for rank in (0, 1)]
    for one, left, right in zip(whole, *parts, strict=True):
        assert one.keys == left.keys + right.keys
        assert torch.equal(one.global_, torch.cat([left.global_, right.global_], 1))


def test_a_start_position_goes_on_where_the_other_stopped(tiny: list[str]) -> None:
    assert all(same(a, b) for a, b in zip(batches(tiny, 6)[4:], batches(tiny, 2, start=32), strict=True))


@pytest.mark.parametrize(
    ("size", "micro", "world", "advice"),
    [
        (256, 64, 8, "batch.micro=64 images on 8 processes: say batch.micro=32"),  # derm-b on eight GPUs
        (64, 64, 2, "say batch.micro=32"),
        (64, 48, 1, "on 1 process: say batch.micro=32"),
        (64, 3, 1, "say batch.micro=16"),  # no pass parts a group of spread
        (64, -1, 1, "say batch.micro=16"),
        (64, 64, 3, "start 2 processes with batch.micro=32, or make batch.size a multiple of 48"),
        (64, 0, 3, "evenly over 3 processes: start 2 processes, or make batch.size a multiple of 48"),
        (
            48,
            16,
            2,
            "start 1 process with batch.micro=16, or make batch.size a multiple of 32",
        ),  # 24 each would part a group
        (2, 0, 3, "start 1 process, or make batch.size a multiple of 6"),
        (40, 3, 1, "on 1 process: make batch.size a multiple of 16"),
    ],
)
def test_a_batch_that_cannot_be_parted_gets_advice_that_works(
    tiny: list[str], size: int, micro: int, world: int, advice: str
) -> None:
    def parted(*asked: str, world: int = world) -> int:
        return data.micro_batch(load([*tiny, "out=x", "objectives.spread.group=16", *asked]), world)

    with pytest.raises(ValueError, match=f"batch.size={size} cannot be parted .*{advice}$"):
        parted(f"batch.size={size}", f"batch.micro={micro}")
    if found := re.search(r"say batch\.micro=(\d+)", advice):
        assert parted(f"batch.size={size}", found[0].removeprefix("say ")) == int(found[1])
    if found := re.search(r"start (\d+)", advice):
        then = re.search(r"batch\.micro=\d+(?=, or)", advice)
        assert parted(f"batch.size={size}", then[0] if then else "batch.micro=0", world=int(found[1]))
    if found := re.search(r"multiple of (\d+)", advice):
        assert parted(f"batch.size={found[1]}", "batch.micro=0")


def test_crops_differ_between_epochs_and_seeds(tiny: list[str]) -> None:
    plain = "stream.labelled_fraction=0"
    recipe = load([*tiny, "out=x", plain])
    samples = len(Index.open(recipe.data.train).select(recipe.data.splits))
    epochs = batches(tiny, -(-2 * samples // 8), plain)
    seen: dict[str, list[torch.Tensor]] = {}
    for batch in epochs:
        for i, key in enumerate(batch.keys):
            seen.setdefault(key, []).append(batch.global_[:, i])
    assert all(len(crops) >= 2 for crops in seen.values())
    assert all(not torch.equal(crops[0], crops[1]) for crops in seen.values())
    assert batches(tiny, 1, plain)[0].keys != batches(tiny, 1, plain, "seed=1")[0].keys


def test_only_labelled_images_carry_a_clean_view(tiny: list[str]) -> None:
    for batch in batches(tiny, 4):
        assert batch.clean_of.tolist() == batch.labelled.nonzero().flatten().tolist()
        assert len(batch.clean) == int(batch.labelled.sum()) >= 2  # a quarter of 8 is drawn from the labelled


def test_an_unreadable_image_is_replaced_and_named(tiny: list[str], index: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(index, broken)
    opened = Index.open(broken)
    victim = int(opened.select()[3])
    name, _ = opened.shard_of(victim)
    offset, size = opened.column("image")[victim]
    with open(broken / name, "r+b") as file:
        file.seek(int(offset))
        file.write(b"\0" * int(size))
    found = batches([a for a in tiny if not a.startswith("data.train")], 30, f"data.train={broken}")
    bad = [record for batch in found for record in batch.bad]
    assert {record["key"] for record in bad} == {opened.key(victim)}
    assert all(len(batch) == 8 for batch in found)


def test_what_an_audit_names_is_not_read(tiny: list[str], tmp_path: Path) -> None:
    index = Index.open(load([*tiny, "out=x"]).data.train)
    train = index.select(("train", ""))
    drop, leaks = index.key(int(train[0])), index.key(int(train[5]))
    document = {
        "format": "hybridssl-audit",
        "version": 1,
        "index": {"name": "tiny", "sha256": index.sha256, "samples": len(index)},
        "drop": [drop],
        "leaks": [leaks],
    }
    path = tmp_path / "audit.json"
    path.write_text(json.dumps(document))
    asked = (f"stream.exclude={path}", "stream.labelled_fraction=0")
    count = -(-len(train) // 8)
    assert {drop, leaks} <= {key for batch in batches(tiny, count, asked[1]) for key in batch.keys}
    assert not {drop, leaks} & {key for batch in batches(tiny, 2 * count, *asked) for key in batch.keys}
    recipe = load([*tiny, "out=x", *asked])
    assert len(data.selected(recipe, index)) == len(train) - 2
    path.write_text(json.dumps(document | {"leaks": [index.key(i) for i in range(len(index))]}))
    with pytest.raises(DataError, match="leaves no sample"):
        data.selected(recipe, index)


def test_a_run_on_a_damaged_set_stops_and_says_so(tiny: list[str], index: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(index, tmp_path / "broken")
    opened = Index.open(tmp_path / "broken")
    for victim in opened.select()[::3]:
        offset, size = opened.column("image")[victim]
        with open(tmp_path / "broken" / opened.shard_of(victim)[0], "r+b") as file:
            file.seek(int(offset))
            file.write(b"\0" * int(size))
    kept = [a for a in tiny if not a.startswith("data.train")]
    assert main([*kept, f"data.train={tmp_path / 'broken'}", f"out={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert "damaged samples after" in said
    assert "max_bad_fraction" in said
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) > 1
