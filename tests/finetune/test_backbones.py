from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.numpy import save_file
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from finetune.backbones import load
from hybridssl.errors import UserError
from hybridssl.run import latest, load_backbone
from hybridssl.views import normalise


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_run_and_export_are_one_backbone(run_folder, export_folder, images):
    a, b = load(str(run_folder)), load(str(export_folder))
    assert a.sha256 == b.sha256
    assert (
        (a.dim, a.input_size, a.mean, a.std)
        == (b.dim, b.input_size, b.mean, b.std)
        == (24, 32, (0.5,) * 3, (0.25,) * 3)
    )
    tokens = load_backbone(run_folder)[0](normalise(images, a.mean, a.std))
    for encoder in (a, b):
        found = encoder.features(images)
        torch.testing.assert_close(found["cls"], tokens.cls, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["patch_mean"], tokens.patches.mean(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(encoder.patches(images), tokens.patches, atol=1e-5, rtol=1e-5)


def test_random_weights_keep_the_form_and_come_from_the_seed(run_folder, export_folder, images):
    trained = load(str(export_folder))
    for spec in (f"random:{run_folder}", f"random:{export_folder}"):
        a, same, other = load(spec, seed=3), load(spec, seed=3), load(spec, seed=4)
        assert (a.dim, a.input_size, a.mean) == (trained.dim, trained.input_size, trained.mean)
        assert a.baseline
        assert not trained.baseline
        assert a.sha256 == same.sha256
        assert len({a.sha256, other.sha256, trained.sha256}) == 3
        assert torch.equal(a.features(images)["cls"], same.features(images)["cls"])


def test_loading_random_weights_moves_nobody_elses_random_numbers(export_folder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(f"random:{export_folder}")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_any_timm_architecture(name):
    encoder = load(f"random:{name}")
    about = timm.create_model(name).pretrained_cfg
    assert encoder.input_size == about["input_size"][-1]
    assert encoder.mean == tuple(about["mean"])
    found = encoder.features(torch.zeros(2, 3, encoder.input_size, encoder.input_size, dtype=torch.uint8))
    assert {x.shape for x in found.values()} == {(2, encoder.dim)}
    assert load(f"random:timm:{name}").sha256 == encoder.sha256


def test_another_size_on_request(export_folder):
    encoder = load(str(export_folder), size=64)
    assert encoder.input_size == 64
    assert encoder.patches(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 64, 24)


@pytest.fixture
def hf_folder(tmp_path):
    torch.manual_seed(9)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    ViTModel(ViTConfig(**shape, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size, image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(tmp_path)
    return tmp_path


def test_transformers_model_with_its_own_normalisation(hf_folder, images):
    encoder = load(f"hf:{hf_folder}")
    assert (encoder.dim, encoder.input_size, encoder.mean) == (24, 32, (0.4,) * 3)
    model = ViTModel.from_pretrained(hf_folder).eval()
    with torch.no_grad():
        hidden = model(pixel_values=(images.float() / 255 - 0.4) / 0.3).last_hidden_state
    found = encoder.features(images)
    torch.testing.assert_close(found["cls"], hidden[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["patch_mean"], hidden[:, 1:].mean(1), atol=1e-5, rtol=1e-5)
    assert load(f"random:hf:{hf_folder}").sha256 != encoder.sha256


def test_our_export_through_transformers(export_folder, images):
    ours, theirs = load(str(export_folder)), load(f"hf:{export_folder}")
    assert (ours.input_size, ours.mean) == (theirs.input_size, theirs.mean)
    torch.testing.assert_close(ours.features(images)["cls"], theirs.features(images)["cls"], atol=1e-5, rtol=1e-5)


def test_histogram_by_hand():
    encoder = load("histogram")
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[:, 0, :32], image[:, 1] = (
        255,
        40,
    )  # upper half (255, 40, 0): bin (7, 1, 0); lower half (0, 40, 0): bin (0, 1, 0)
    vector = encoder.features(image)["cls"][0]
    assert encoder.baseline
    assert vector.shape == (encoder.dim,)
    assert vector[:512].nonzero()[:, 0].tolist() == [8, 7 * 64 + 8]
    assert vector[8].item() == pytest.approx(0.5**0.5)
    thumbnail = vector[512:].view(3, 16, 16)
    assert thumbnail[0, :8].unique().tolist() == [1.0]
    assert thumbnail[0, 8:].unique().tolist() == [0.0]
    with pytest.raises(UserError, match="no patch features"):
        encoder.patches(image)


def test_pretraining_digests_come_along(run_folder, export_folder, tmp_path):
    assert load(str(run_folder)).digests is None
    folder = shutil.copytree(export_folder, tmp_path / "m")
    save_file({"digest": np.array([5, -3, 5])}, folder / "pretraining.safetensors")
    assert load(str(folder)).digests.tolist() == [-3, 5]
    assert load(f"random:{folder}").digests is None, "fresh weights have seen nothing"
    (folder / "pretraining.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"pretraining\.safetensors cannot be read"):
        load(str(folder))


@pytest.mark.parametrize(
    ("cwd", "name"),
    [
        ("", "checkpoints/{}"),
        ("checkpoints", "{}"),
        ("checkpoints/{}", "."),
        ("..", "a/checkpoints/{}"),
        ("..", "link"),
    ],
)
def test_pretraining_digests_are_found_wherever_the_command_is_given(run_folder, tmp_path, monkeypatch, cwd, name):
    folder = shutil.copytree(run_folder, tmp_path / "a")
    save_file({"digest": np.array([5, -3, 5])}, folder / "pretraining.safetensors")
    step = latest(folder).name
    (tmp_path / "link").symlink_to(f"a/checkpoints/{step}")
    monkeypatch.chdir(folder / cwd.format(step))
    assert load(name.format(step)).digests.tolist() == [-3, 5]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:vit_smal_patch16_224", "near: vit_small_patch16_224"),
        ("vit_small_patch16_224", "near: timm:vit_small_patch16_224"),
        ("random:no_such_thing", "timm has no 'no_such_thing'"),
        ("models/absent", "no backbone 'models/absent'"),
        ("timm:vit_small_patch8_224.nonsense", r"it has: .*vit_small_patch8_224\.dino"),
        ("timm:test_vit.nonsense", r"it has: test_vit\.r160_in1k"),
    ],
)
def test_a_wrong_name_is_answered_with_near_ones(spec, message):
    with pytest.raises(UserError, match=message):
        load(spec)


def test_a_folder_that_is_nothing(tmp_path):
    with pytest.raises(UserError, match="neither a run folder"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match="names no timm architecture"):
        load(str(tmp_path))


def test_damaged_export(export_folder, tmp_path):
    folder = shutil.copytree(export_folder, tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=f"cannot load {folder}"):
        load(str(folder))


@pytest.mark.parametrize("spec", ["timm:vit_tiny_patch16_224", "hf:nobody/no-such-model"])
def test_without_network_one_message_that_names_it(spec, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"{spec} is not on this machine"):
        load(spec)
