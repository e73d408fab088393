"""That benchmarks/endtoend.py measures training from files: loaders that read them, and figures of the time it says."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import common, endtoend, fed, feeds
from benchmarks.contestants import Setting
from benchmarks.peers import PEERS
from benchmarks.step import SIZES
from hybridssl.recipe import resolve
from pretrain.recipe import Recipe
from shards.index import Index
from tests.benchmarks import dinov2_package

SETTING = SIZES["test"][0]
CPU = torch.device("cpu")
FAST = {"images_per_s": 30.0, "data_wait": 0.1, "memory_gib": 1.0}
SLOW = {"images_per_s": 10.0, "data_wait": 0.5, "memory_gib": 2.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return endtoend.pictures(tmp_path_factory.mktemp("endtoend"), 12, 64)


def terms(files: tuple[Path, Path], seconds: float = 0.1, keys: tuple[str, ...] = ()) -> fed.Terms:
    return fed.Terms(*files, seconds=seconds, workers=0, threads=1, keys=keys)


def test_images_are_made_once_and_packed_as_they_are(files: tuple[Path, Path]) -> None:
    images, packed = files
    index = Index.open(packed)
    paths = sorted(images.rglob("*.jpg"))
    assert len(index) == len(paths) == 12
    assert {index.read(i).image for i in range(12)} == {path.read_bytes() for path in paths}
    before = paths[0].stat().st_mtime_ns
    assert endtoend.pictures(packed.parent.parent, 12, 64) == files
    assert paths[0].stat().st_mtime_ns == before


@pytest.mark.timeout(900)  # it times two training runs, however slow the machine is
def test_both_ways_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command: `pretrain` and a peer, in processes of their own with loader processes, and the file they end in."""
    monkeypatch.setattr(common, "RESULTS", tmp_path / "benchmarks" / "results")
    common.RESULTS.parent.mkdir()
    arguments = ["--size", "test", "--seconds", "0.3", "--workers", "1", "--threads", "1", "--count", "12"]
    arguments += ["--side", "64", "--work", str(tmp_path), "--only", "ours", "lightly's parts"]
    endtoend.main(arguments)
    (found,) = json.loads((common.RESULTS / "endtoend-test.json").read_text()).values()
    assert found["left_out"] == {}
    assert found["setting"]["prototypes"] == SETTING.prototypes
    assert found["images"] == 12
    assert found["contestants"].keys() == {"ours", "lightly's parts"}
    for entry in found["contestants"].values():
        assert entry["images_per_s"] > 0
        assert entry["turns"] == [entry["images_per_s"]]
        assert 0 <= entry["data_wait"] < 1
    ours, lightly = (found["contestants"][name] for name in ("ours", "lightly's parts"))
    assert lightly["ours_over_it"] == pytest.approx(ours["images_per_s"] / lightly["images_per_s"], rel=0.01)
    assert not list(tmp_path.glob("*/tmp*"))  # nothing is left of the run


def test_a_contestant_that_fails_costs_no_other_figure(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> fed.Figures:
        raise RuntimeError("no kernel image")

    kept: list[dict] = []
    contestants = {"ours": lambda *_: FAST, "broken": broken, "theirs": lambda *_: SLOW}
    endtoend.race(SETTING, contestants, terms(files), 2, kept.append)
    assert kept[-1]["contestants"].keys() == {"ours", "theirs"}
    assert kept[-1]["contestants"]["theirs"]["ours_over_it"] == 3
    assert kept[-1]["contestants"]["theirs"]["turns"] == [10.0, 10.0]
    assert kept[-1]["left_out"] == {"broken": "RuntimeError: no kernel image"}
    assert len(kept) == 5  # written after each, and what is broken is not tried again
    assert kept[0]["contestants"].keys() == {"ours"}
    assert "left out: broken" in capsys.readouterr().out


def test_work_is_that_of_the_published_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-B/16, 2 x 224 + 8 x 96: 431 GFLOP and 12 of heads; at 900 images/s 40 % of an H100's peak."""
    monkeypatch.setattr(endtoend.meters, "peak", lambda *_: 989.0)
    base = next(setting for setting in SIZES["gpu"] if "base" in setting.name)
    found = endtoend.compare(base, {"ours": [{**FAST, "images_per_s": 900.0}]})
    assert found["gflop_per_image"] == pytest.approx(443, rel=0.05)
    assert found["contestants"]["ours"]["mfu"] == pytest.approx(0.4, rel=0.05)


def test_a_run_is_read_after_its_warm_up(files: tuple[Path, Path], tmp_path: Path) -> None:
    metrics, asked = tmp_path / "metrics.jsonl", terms(files, seconds=3)
    assert fed.read(metrics, asked) is None  # there is none yet

    def write(*lines: tuple[float, int, float]) -> None:
        names = ("seconds", "images", "data_wait")
        texts = [json.dumps({**dict(zip(names, line, strict=True)), "memory_gib": 1.5}) for line in lines]
        metrics.write_text("\n".join([*texts, '{"step": 50, "sec']))

    write((0.9, 10, 0.9), (1.1, 20, 0.9), (4.0, 100, 0.5))  # the second line ends the warm-up, 2.9 s before the third
    assert fed.read(metrics, asked) is None
    write((0.9, 10, 0.9), (1.1, 20, 0.9), (4.1, 110, 0.5), (5.1, 140, 0.1))
    found = fed.read(metrics, asked)
    assert found is not None
    assert found["images_per_s"] == pytest.approx(120 / 4)
    assert found["data_wait"] == pytest.approx((3 * 0.5 + 1 * 0.1) / 4)


def test_a_run_that_cannot_begin_is_told(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="exit code 1"):
        fed.ours(SETTING, terms(files))


@pytest.mark.parametrize("setting", [setting for settings in SIZES.values() for setting in settings])
def test_the_recipe_is_the_setting(files: tuple[Path, Path], setting: Setting) -> None:
    recipe = resolve(Recipe, [fed.recipe_of(setting, terms(files))])
    assert recipe.objectives["dino"].prototypes == recipe.objectives["ibot"].prototypes == setting.prototypes  # type: ignore[attr-defined]
    assert recipe.backbone.args["embed_dim"] == setting.embed
    assert (recipe.views.global_size, recipe.views.local_size) == (setting.global_size, setting.local_size)
    assert (recipe.batch.size, recipe.precision) == (setting.batch, setting.precision)


def test_a_peers_batches_come_without_end_and_each_image_once_a_round() -> None:
    batches = feeds.endless(range(12), SETTING, 0)
    seen = Counter(number for _ in range(9) for number in next(batches).tolist())
    assert seen == dict.fromkeys(range(12), 3)


@pytest.mark.parametrize("name", ["lightly's parts", "DINOv2"])
def test_a_peer_learns_from_the_files(name: str, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    dinov2_package.install(monkeypatch)
    torch.manual_seed(0)  # two crops of an image may be the same one, once in many draws
    feed = feeds.FEEDS[name](SETTING, files[0], 0, CPU)
    large, small = feed()[:2]
    assert large.shape == (2 * SETTING.batch, 3, SETTING.global_size, SETTING.global_size)
    assert small.shape == (SETTING.local_count * SETTING.batch, 3, SETTING.local_size, SETTING.local_size)
    assert len({image.numpy().tobytes() for image in [*large, *feed()[0]]}) == 4 * SETTING.batch  # no crop comes twice
    asked = []
    step = PEERS[name](SETTING, CPU, lambda: asked.append(None) or feed())
    for _ in range(2):
        step()
    assert len(asked) == 2
    figures = fed.peer(name, SETTING, terms(files))
    assert figures["images_per_s"] > 0
    assert 0 < figures["data_wait"] < 1
