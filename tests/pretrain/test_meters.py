"""What a run says of its own speed, against torch's own count and a clock."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridssl import student
from hybridssl.views import render
from pretrain import data, loop, meters
from pretrain.assemble import build_student
from pretrain.command import load
from pretrain.loop import main
from pretrain.meters import Meter, Pace
from shards.index import Index
from tests.pretrain.conftest import lines

# A backbone that takes most of the work, as in earnest, and heads that take a tenth.
LARGER = [
    "views.global_size=96",
    "views.local_size=48",
    "views.local_count=4",
    "views.mask_probability=0.5",
    "backbone.args={patch_size: 16, depth: 3, embed_dim: 192, num_heads: 3}",
    "objectives.dino={prototypes: 512, hidden: 256, bottleneck: 64}",
    "objectives.ibot={prototypes: 512, hidden: 256, bottleneck: 64}",
    "objectives.spread=null",
    "objectives.labels=null",
    "stream.labelled_fraction=0",
    "out=x",
]


def counted(arguments: list[str]) -> tuple[float, float]:
    """FLOPs an image: those that torch sees in a step, and those that the meter goes by."""
    recipe = load(arguments)
    index = Index.open(recipe.data.train)
    learner = build_student(recipe, index, recipe.batch.size)
    teacher = student.make_teacher(learner)
    batch = next(iter(data.loader(recipe, index, False, learner.backbone.patch_size, 0, 0, 1)))
    views = render(batch, recipe.views)
    with FlopCounterMode(display=False) as counter:
        (target,) = student.targets(teacher, [views], [batch], 0.5)
        losses, _ = learner(views, target, batch, 0.5)
        loop.weighted(losses, recipe, 0.5).backward()
    said = meters.work(recipe, learner, index.channels)
    return counter.get_total_flops() / recipe.batch.size, said[batch.global_.shape[-1]]


def test_work_is_what_torch_counts(tiny: list[str]) -> None:
    found, said = counted([*tiny, *LARGER])
    assert 0.85 * found < said < 1.02 * found  # below: heads compute their scores more than once, to save memory
    dino = [a for a in LARGER if "ibot" not in a]
    small, reckoned = counted([*tiny, *LARGER, "views.curriculum=0.5"])  # a run begins with half-size crops
    assert 0.85 * small < reckoned < 1.02 * small
    assert reckoned < said / 2.5
    shorter, less = counted([*tiny, *LARGER, "views.left_out=0.5"])
    assert 0.85 * shorter < less < 1.02 * shorter
    assert less < 0.95 * said
    alone, without = counted([*tiny, *dino, "objectives.ibot=null"])
    assert 0.85 * alone < without < 1.02 * alone
    assert without < said
    painted, reckoned = counted([*tiny, *dino, "objectives={ibot: null, pixels: {}}"])
    assert 0.85 * painted < reckoned < 1.02 * painted
    assert reckoned == without  # hidden patches meet no prototypes


def test_work_of_a_convolution_or_of_labels_alone_is_not_told(tiny: list[str]) -> None:
    recipe = load([*tiny, "objectives={dino: null, ibot: null, spread: null}", "out=x"])
    index = Index.open(recipe.data.train)
    assert meters.work(recipe, build_student(recipe, index, 8), index.channels) == {}


def test_a_meter_is_a_clock() -> None:
    meter = Meter(batch=10, work={32: 1e12, 64: 4e12}, peak=400, world=2)
    with meter.waiting():
        time.sleep(0.03)
    time.sleep(0.03)
    for side in (32, 64, 64):
        meter.step(side)
    read = meter.read()
    assert read["images_per_s"] <= 30 / 0.06
    assert 0 < read["data_wait"] <= 1
    assert read["tflops"] == pytest.approx(read["images_per_s"] * 3 / 2)  # 3 an image, on two devices
    assert read["mfu"] == pytest.approx(read["tflops"] / 400)
    meter.restart()
    assert meter.read() | {"memory_gib": 0} == {"images_per_s": 0, "data_wait": 0, "memory_gib": 0}
    unknown, peakless = Meter(10, {}, 400), Meter(10, {64: 1e12}, None)
    for one in (unknown, peakless):
        one.step(64)
    assert not {"tflops", "mfu"} & unknown.read().keys()
    assert {"tflops"} == {"tflops", "mfu"} & peakless.read().keys()


def test_the_time_left_reckons_with_larger_crops_and_then_measures_them() -> None:
    work = {32: 1.0, 64: 3.0}
    pace = Pace(steps=10, small=6, work=work, lines=[])
    assert pace.left(2, 2.0) == pytest.approx(4 * 1 + 4 * 3)  # a second a step, three of the larger ones
    assert pace.left(6, 6.0) == pytest.approx(4 * 3)
    assert pace.left(7, 8.0) == pytest.approx(3 * 2)  # it took two
    assert pace.left(10, 14.0) == 0
    lines = [{"step": 0, "probe/knn": 0.1}, {"step": 6, "seconds": 6.0}, {"step": 7, "seconds": 8.0}]
    assert Pace(10, 6, work, lines).left(8, 10.0) == pytest.approx(2 * 2)  # of a run that goes on
    assert Pace(10, 0, {64: 3.0}, []).left(4, 8.0) == pytest.approx(6 * 2)
    assert Pace(10, 0, {64: 3.0}, [], begun=3).left(4, 8.0) == pytest.approx(6 * 8)  # of a branch
    assert Pace(10, 6, work, [], begun=4).left(5, 2.0) == pytest.approx(Pace(10, 6, work, []).left(5, 10.0))
    assert Pace(10, 6, {}, []).left(6, 6.0) == pytest.approx(4 * 4)  # by the pixels, where no FLOPs are known


def test_memory_grows_with_what_is_held() -> None:
    before, held = meters.memory(), []
    while meters.memory() <= before and len(held) << 26 <= before:  # of the peak so far, little may be left
        held.append(torch.ones(1 << 26, dtype=torch.uint8))  # and no more than that is taken
    if not torch.cuda.is_initialized():
        assert meters.memory() > before
        assert meters.memory() > len(held) << 26


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert meters.peak(torch.device("cuda"), "bf16") == peak
    assert meters.peak(torch.device("cuda"), "no") is None
    assert meters.peak(torch.device("cpu"), "bf16") is None


def test_a_run_tells_its_speed_in_the_log_and_on_the_way(tiny: list[str], tmp_path: Path, capsys) -> None:
    assert main([*tiny, f"out={tmp_path / 'run'}"]) == 0
    told = lines(tmp_path / "run")
    for line in told:
        assert line["tflops"] > 0
        assert line["memory_gib"] > 0.05
        assert 0 <= line["data_wait"] < 1
        assert "mfu" not in line or line["mfu"] < 1
        assert line["eta"] == pytest.approx(line["seconds"] / line["step"] * (4 - line["step"]), abs=0.1)
    assert told[-1]["eta"] == 0
    shown = capsys.readouterr().out
    for words in ("images/s", "waiting for data", "GFLOP/s", "GiB", "min left"):
        assert words in shown
    html = (tmp_path / "run" / "report.html").read_text()
    for words in ("TFLOP/s", "Memory", "Waiting for data", "Images per second"):
        assert words in html
