"""An exported folder gives our features in timm and in transformers, and is whole or not there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from hybridssl import card, run
from hybridssl import export as exporting
from hybridssl.errors import UserError
from hybridssl.export import export
from hybridssl.stated import Stated
from tests.hybridssl.exports import CONVOLUTIONS, TINY, make_run


@pytest.fixture
def tiny(tmp_path) -> Path:
    return make_run(tmp_path / "run", registers=4)


MODELS = {
    "registers": {"registers": 4},
    "no registers": {},
    "one channel": {"channels": 1, "registers": 2},
    "five channels": {"channels": 5},
    "layout of another size": {"image_size": 64, "registers": 4},
    "layer scale, as DINOv2": {"name": "vit_small_patch14_reg4_dinov2", "args": {**TINY, "patch_size": 14}, "size": 28},
    "pools by mean": {"name": "vit_base_patch16_rpn_224", "args": {**TINY, "class_token": True}, "size": 32},
    "drop path": {"drop_path": 0.3},
}


@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_features_are_ours_in_timm_and_in_transformers(tmp_path, options, which):
    folder, out = make_run(tmp_path / "run", **options), tmp_path / "out"
    report = export(folder, out, which)
    assert set(report.parity) == {"timm", "transformers"}
    assert max(report.parity.values()) <= 1e-5

    ours, state = run.load_backbone(folder, which)
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    auto = AutoModel.from_pretrained(out).eval()
    channels, size = state["backbone"]["channels"], state["backbone"]["image_size"]
    for extra in (0, ours.patch_size):
        images = torch.randn(3, channels, size, size + extra)
        with torch.no_grad():
            tokens = ours(images)
            whole = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1)
            assert (theirs.forward_features(images) - whole).abs().max() <= 1e-5
            assert (auto(pixel_values=images).last_hidden_state - whole).abs().max() <= 1e-5
            assert (theirs(images) - tokens.cls).abs().max() <= 1e-5  # the plain call: the image feature
    assert whole.std() > 0.1  # not all zero, which would agree with anything


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_gives_our_features_in_timm_in_transformers_and_by_its_card(tmp_path, monkeypatch, name):
    folder = make_run(tmp_path / "run", channels=1, size=64, name=name, args=CONVOLUTIONS[name])
    report = export(folder, tmp_path / "out")
    assert max(report.parity.values()) <= 1e-5
    ours, _ = run.load_backbone(folder)
    assert ours(torch.ones(1, 1, 64, 64)).cls.std() > 0.01
    monkeypatch.chdir(tmp_path / "out")
    card_text = Path("README.md").read_text()
    assert "register tokens" not in card_text
    for block in re.findall(r"```python\n(.*?)```", card_text, re.DOTALL):
        names: dict = {}
        exec(block.replace("torch.zeros", "torch.ones"), names)
        with torch.no_grad():
            tokens = ours(torch.ones(1, 1, 64, 64))
        torch.testing.assert_close(names["image_feature"], tokens.cls)
        torch.testing.assert_close(names["patch_features"], tokens.patches)


def test_folder_says_how_images_are_prepared(tiny, tmp_path):
    export(tiny, tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 32, 32)
    assert (*config["mean"], *config["std"]) == (0.5, 0.5, 0.5, 0.2, 0.2, 0.2)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    expected = (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - 0.5) / 0.2
    torch.testing.assert_close(timm.data.create_transform(**config)(picture), expected)
    processed = AutoImageProcessor.from_pretrained(tmp_path / "out")(picture)["pixel_values"][0]
    torch.testing.assert_close(processed, expected)


def test_folder_tells_what_was_read_and_no_path(tiny, tmp_path):
    save_file({"digest": torch.tensor([3, -9])}, tiny / "pretraining.safetensors")
    export(tiny, tmp_path / "out")
    names = {"config.json", "model.safetensors", "README.md", "pretraining.json", "pretraining.safetensors"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    about = json.loads((tmp_path / "out/pretraining.json").read_text())
    assert (about["samples"], about["images"], about["step"], about["splits"]) == (55, 1234, 7, ["train", ""])
    assert about["recipe"]["data"] == {"train": "derm", "probe": "held out"}
    assert about["recipe"]["stream"] == {"exclude": "derm.json,b.json"}
    assert about["recipe"]["backbone"]["weights"] == "timm/vit_small"  # a hub id says where the weights came from
    assert about["recipe"]["text"]["encoder"] == "bert"
    assert load_file(tmp_path / "out/pretraining.safetensors")["digest"].tolist() == [3, -9]
    for path in (tmp_path / "out").iterdir():
        assert not re.search(rb"somebody|ward-7", path.read_bytes())


@pytest.mark.parametrize("channels", [1, 3])
def test_code_of_the_card_runs(tmp_path, monkeypatch, channels):
    export(make_run(tmp_path / "run", registers=4, channels=channels), tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    features = []
    for block in blocks:
        names: dict = {}
        exec(block, names)
        assert names["patch_features"].shape == (1, 16, 32)
        features.append(names["image_feature"])
    torch.testing.assert_close(*features)


def test_card_escapes_what_comes_from_data(tiny, tmp_path):
    export(tiny, tmp_path / "o <b>ut", stated=Stated(license="apache-2.0"))
    text = (tmp_path / "o <b>ut/README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "timm"
    assert yaml.safe_load(head)["license"] == "apache-2.0"
    prose = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert not re.search("<[a-z/]", prose)
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 3 for line in rows)  # no data opened another cell
    assert "\n# head" not in prose
    assert "````yaml" in body  # the recipe holds three backticks, so its fence has four
    assert "not a medical device" in prose
    assert "55" in prose
    assert card.listed([], "none") == "none"
    assert card.listed([str(i) for i in range(60)], "none").endswith("49 and 10 more")


def test_nothing_is_left_when_features_differ(tiny, tmp_path, monkeypatch):
    def off(folder):
        model = exporting._with_timm(folder)
        return lambda images: model(images) + 2e-5

    monkeypatch.setitem(exporting.LOADERS, "timm", off)
    with pytest.raises(UserError, match="not exported: the features that timm gives differ"):
        export(tiny, tmp_path / "deep/out")
    assert not list((tmp_path / "deep").iterdir())


def test_earlier_export_is_replaced_only_when_asked(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(tiny, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="add --overwrite"):
        export(tiny, out)
    monkeypatch.setitem(exporting.LOADERS, "timm", lambda folder: torch.zeros_like)  # another shape
    with pytest.raises(UserError, match="not exported: timm cannot use the result"):
        export(tiny, out, "student", overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before  # a failed replacement leaves the old one
    monkeypatch.undo()
    export(tiny, out, "student", overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_foreign_folder_is_never_replaced(tiny, tmp_path):
    for mine in (tiny, tmp_path / "file.txt"):
        if not mine.exists():
            mine.write_text("mine")
        with pytest.raises(UserError, match="exists and is not an export"):
            export(tiny, mine, overwrite=True)
    assert (tiny / "checkpoints").is_dir()
    (tmp_path / "empty").mkdir()
    export(tiny, tmp_path / "empty")
    assert (tmp_path / "empty/config.json").is_file()


def test_one_checkpoint_can_be_named(tmp_path):
    make_run(tmp_path / "run", step=5)
    make_run(tmp_path / "run", step=40)
    assert export(tmp_path / "run", tmp_path / "a").step == 40
    assert export(tmp_path / "run/checkpoints/step-5", tmp_path / "b").step == 5
    with pytest.raises(UserError, match="run folder"):
        export(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("cwd", [".", "run", "run/checkpoints", "run/checkpoints/step-7", "linked", "elsewhere"])
def test_what_was_read_comes_along_wherever_the_command_is_given(tiny, tmp_path, monkeypatch, cwd):
    """Without it evaluation could not refuse a test image that was trained on."""
    save_file({"digest": torch.tensor([3, -9])}, tiny / "pretraining.safetensors")
    (tmp_path / "linked").symlink_to("run/checkpoints")
    if cwd == "elsewhere":  # the checkpoints lie on another disk
        (tiny / "checkpoints").rename(tmp_path / "elsewhere")
        (tiny / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "step-7").symlink_to("run/checkpoints/step-7")
    named = {"run": "checkpoints/step-7", "run/checkpoints/step-7": ".", "elsewhere": "../run"}.get(cwd, "step-7")
    monkeypatch.chdir(tmp_path / cwd)
    export(named, tmp_path / "out")
    assert load_file(tmp_path / "out/pretraining.safetensors")["digest"].tolist() == [3, -9]
