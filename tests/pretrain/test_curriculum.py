"""views.curriculum: when crops grow, that nothing but the position decides it, and what a run makes of both sizes."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.assemble import build_student
from pretrain.command import load
from pretrain.curriculum import curriculum, small_steps
from pretrain.loop import main
from shards.index import Index
from tests.pretrain.conftest import TINY, launch, lines, losses
from tests.pretrain.test_data import batches, same
from tests.pretrain.test_loop import assert_close

HALF = "views.curriculum=0.5"  # of TINY's four steps: 16 px, then 32
TURN = 16  # the position at which crops grow
DENSENET = ["recipe=cxr-densenet121", "objectives.text_pairs=null", "objectives.ibot=null", "batch.micro=0"]
DENSENET += ["views.global_size=128", "views.local_size=64"]
DENSENET += ["backbone.args={growth_rate: 4, block_config: [1, 1, 1, 1]}"]


def sides(found: list) -> list[tuple[int, int, int]]:
    return [(b.global_.shape[-1], b.local.shape[-1], b.masks.shape[-1]) for b in found]


@pytest.fixture(scope="module")
def whole(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*TINY, f"data.train={index}", HALF, f"out={out}"]) == 0
    return out


def test_crops_and_masks_grow_together_at_one_step(tiny: list[str]) -> None:
    found = batches(tiny, 5, HALF)
    assert sides(found) == [(16, 8, 4)] * 2 + [(32, 16, 16)] * 3
    assert [b.clean.shape[-1] for b in found] == [16, 16, 32, 32, 32]  # they share a pass with the global views
    assert all(same(a, b) for a, b in zip(found[2:], batches(tiny, 5)[2:], strict=True))  # as if there were none


@pytest.mark.parametrize(
    ("share", "steps", "expected"), [(0.75, 4, 3), (0.29, 100, 29), (0.7, 10, 7), (0.99, 4, 3), (0.1, 4, 0), (0, 4, 0)]
)
def test_the_share_is_of_steps_and_the_end_is_at_full_size(share, steps, expected, tiny: list[str]) -> None:
    recipe = load([*tiny, "out=x", f"steps={steps}", f"views.curriculum={share}"])
    assert small_steps(recipe) == expected
    sizes = curriculum(recipe, 8)
    assert sizes.views(8 * expected) == recipe.views
    assert sizes.views(8 * expected - 1).global_size == (16 if expected else 32)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing_across_the_turn(tiny: list[str], workers: int) -> None:
    alone, shared = batches(tiny, 5, HALF), batches(tiny, 5, HALF, f"data.workers={workers}")
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("start", [8, TURN, 24])
def test_a_start_position_has_the_size_of_its_step(start: int, tiny: list[str]) -> None:
    found = batches(tiny, 5, HALF)[start // 8 :]
    assert all(same(a, b) for a, b in zip(found, batches(tiny, len(found), HALF, start=start), strict=True))


def test_processes_and_micro_batches_turn_at_the_same_step(tiny: list[str]) -> None:
    expected = sides(batches(tiny, 4, HALF))
    for rank in (0, 1):
        parts = batches(tiny, 8, HALF, "batch.micro=2", rank=rank, world=2)
        assert sides(parts) == [one for one in expected for _ in range(2)]


def test_small_crops_are_cut_from_smaller_decodes(tiny: list[str]) -> None:
    sizes = curriculum(load([*tiny, "out=x", HALF]), 8)
    assert sizes.decode_at_least(TURN - 1) <= sizes.decode_at_least(TURN) / 2 + 1


def test_micro_batches_equal_one_batch_at_both_sizes(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    assert main([*tiny, HALF, "batch.micro=4", f"out={tmp_path / 'micro'}"]) == 0
    assert_close(losses(tmp_path / "micro"), losses(whole), 1e-4)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("step", [1, 2])  # before the turn, and at it
def test_a_killed_run_goes_on_bit_for_bit_across_the_turn(
    step: int, whole: Path, tiny: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    arguments = [*tiny, HALF, f"out={out}", "save.every=1"]
    process = launch(arguments)  # by the door
    while process.poll() is None and not (out / "checkpoints" / f"step-{step}").is_dir():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert main(arguments) == 0
    assert losses(out) == losses(whole)
    a, b = (load_file(run / "checkpoints" / "step-4" / "model.safetensors") for run in (out, whole))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_tells_the_size_and_its_losses_are_finite(whole: Path) -> None:
    told = lines(whole)
    assert [line["global_size"] for line in told] == [16, 16, 32, 32]
    assert all(math.isfinite(v) for line in told for k, v in line.items() if k.startswith(("loss", "grad_norm")))
    assert not any(line["skipped"] for line in told)
    html = (whole / "report.html").read_text()
    assert "After step 2 all crops have twice the size" in html
    assert "Size of the global views" in html


def test_a_line_ends_where_crops_grow(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main([*tiny, HALF, f"out={out}", "log.every=3", "save.every=4"]) == 0
    assert [(line["step"], line["global_size"]) for line in lines(out)] == [(2, 16), (3, 32), (4, 32)]


@pytest.mark.parametrize(
    "own",
    [
        ["objectives.gram={double: true}", "objectives.anchor={weight: 0.5}"],
        ["objectives.pixels.weight=1", "objectives.swav={prototypes: 16, hidden: 32, bottleneck: 8, weight: 1}"],
        DENSENET,
    ],
    ids=["references", "pixels", "convolution"],
)
def test_objectives_and_backbones_take_both_sizes(own: list[str], tiny: list[str], tmp_path: Path) -> None:
    kept = [word for word in tiny if word.partition("=")[0] not in {one.partition("=")[0] for one in own}]
    assert main([*kept, *own, HALF, "steps=2", f"out={tmp_path / 'run'}"]) == 0
    told = lines(tmp_path / "run")
    assert len({line["global_size"] for line in told}) == 2
    assert all(math.isfinite(v) for line in told for k, v in line.items() if k.startswith("loss"))


def test_mae_is_refused_with_a_remedy(tiny: list[str], tmp_path: Path, capsys) -> None:
    masked = ["views.mask_probability=1", "views.mask_ratio=[0.75, 0.75]", "views.mask_shape=random"]
    mae = [*masked, "objectives.ibot=null", "objectives.pixels={style: mae, width: 32, depth: 1}"]
    assert main([*tiny, *mae, HALF, f"out={tmp_path / 'bad'}"]) == 2
    assert "views.curriculum=0, or objectives.pixels.style=simmim" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_views_too_small_to_halve_are_refused(tiny: list[str], tmp_path: Path, capsys) -> None:
    assert main([*tiny, HALF, "views.global_size=16", f"out={tmp_path / 'bad'}"]) == 2
    assert "half of views.global_size=16 is a single patch of 8 px" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_the_backbone_is_laid_out_for_full_size(tiny: list[str]) -> None:
    recipe = load([*tiny, "out=x", HALF])
    backbone = build_student(recipe, Index.open(recipe.data.train), 8).backbone
    assert backbone.model.pos_embed.shape[1] == 1 + 16
