"""segment through the door on discs that differ by colour, and the heads by themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsRegressor
from torchmetrics.functional.classification import binary_jaccard_index

from finetune import masks, metrics, patch_samples, results, segmenters
from finetune.__main__ import main
from finetune.patch_samples import collect
from finetune.patches import block_maps, load_encoder, spaced
from hybridssl.errors import UserError
from tests.finetune.looked import look
from tests.finetune.masked import make


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    return make(tmp_path_factory.mktemp("discs"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(segmenters, "WIDTH", 8)
    monkeypatch.setattr(segmenters, "MIN_STEPS", 30)
    monkeypatch.setattr(segmenters, "CHECKS", 3)


@pytest.fixture
def segment(discs, tmp_path, run_folder):
    def run(*options, backbone=run_folder, data=discs.root, out=tmp_path / "out"):
        arguments = ["segment", "--backbone", str(backbone), "--data", str(data), "--out", str(out), "--size", "64"]
        return main([*arguments, "--device", "cpu", "--epochs", "1", *map(str, options)])

    return run


@pytest.fixture(scope="module")
def samples(discs):
    return collect(load_encoder("histogram", size=64), discs, np.arange(len(discs)), reads=["patches"])


def rows_of(index, *splits):
    return [np.flatnonzero(index.column("split") == index.splits.index(name)) for name in splits]


def everywhere(truth):
    """Mean IoU of the best constant answer: foreground everywhere."""
    return masks.mean_iou(masks.overlap(truth, np.ones_like(truth)))


def test_samples_are_read_where_they_were_left_and_computed_where_anything_differs(discs, tmp_path, monkeypatch):
    numbers, encoder = np.arange(20), load_encoder("histogram", size=64)

    def get(numbers=numbers, classes=("x",), encoder=encoder):
        return collect(encoder, discs, numbers, classes, ["patches"], cache=tmp_path)

    first = get()
    (file,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(patch_samples, "_compute", None)
        again = get()
        for changed in ({"numbers": numbers[1:]}, {"classes": ("y",)}, {"encoder": load_encoder("histogram", size=56)}):
            with pytest.raises(TypeError, match="not callable"):
                get(**changed)
    for name in ("numbers", "group", "masks", "bad", "classes", "size"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    np.testing.assert_array_equal(again.maps["patches"][0], first.maps["patches"][0])
    file.write_bytes(b"damaged")
    np.testing.assert_array_equal(get().masks, first.masks)
    file.unlink()
    monkeypatch.setattr(patch_samples, "KEPT", 1000)
    get()
    assert not list(tmp_path.iterdir()), "too large to be kept"


@pytest.mark.parametrize("name", ["linear", "knn"])
def test_a_head_learns_what_a_constant_cannot(discs, samples, name):
    train, val, test = rows_of(discs, "train", "val", "test")
    head = segmenters.train_head(name, samples, train, val, lrs=(1e-3, 1e-2), epochs=1)
    found = segmenters.predict_masks(head, samples, test)
    truth = samples.masks[test]
    assert found.shape == truth.shape
    value = masks.mean_iou(masks.overlap(truth, found))
    assert value > everywhere(truth) + 0.4
    on_val = segmenters.predict_masks(head, samples, val)
    assert head.val == pytest.approx(masks.mean_iou(masks.overlap(samples.masks[val], on_val)))
    assert head.val == pytest.approx(max([head.val, *(v for _, v in head.curve)]))


def test_upernet_learns_from_blocks(discs, run_folder):
    encoder = load_encoder(str(run_folder), size=32)
    found = collect(encoder, discs, np.arange(len(discs)), reads=["blocks"])
    assert [x.shape[1:] for x in found.maps["blocks"]] == [(24, 4, 4)] * 2
    train, val, test = rows_of(discs, "train", "val", "test")
    head = segmenters.train_head("upernet", found, train, val, lrs=(1e-2,), epochs=1)
    truth = found.masks[test]
    assert masks.mean_iou(masks.overlap(truth, segmenters.predict_masks(head, found, test))) > everywhere(truth) + 0.2
    again = segmenters.train_head("upernet", found, train, val, lrs=(1e-2,), epochs=1)
    assert again.curve == head.curve  # a function of the seed


def test_images_in_masks_out_agrees_with_stored_features(discs, samples):
    train, val, test = rows_of(discs, "train", "val", "test")
    images = np.stack([masks.read_pair(discs, int(n), 64)[0] for n in samples.numbers[test]])
    for name in ("linear", "knn"):
        head = segmenters.train_head(name, samples, train, val, lrs=(1e-2,), epochs=1)
        segment = segmenters.segmenter(head, load_encoder("histogram", size=64))
        found = segment(torch.from_numpy(images))
        assert (found == segmenters.predict_masks(head, samples, test)).mean() > 0.999


def test_votes_are_scikit_learns(discs, samples, monkeypatch):
    """A weighted k-NN regression of each patch's foreground share, by another library."""
    monkeypatch.setattr(segmenters, "KS", (5,))
    train, val, test = rows_of(discs, "train", "val", "test")
    head = segmenters.train_head("knn", samples, train, val)

    def flat(rows):
        return samples.levels("patches", rows)[0].permute(0, 2, 3, 1).flatten(0, 2).numpy()

    share = segmenters.patch_shares(samples.masks[train], 1, 8)[:, 1].ravel()
    weigh = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
    model = KNeighborsRegressor(5, metric="cosine", algorithm="brute", weights=weigh).fit(flat(train), share)
    ours = head.scores(samples.levels("patches", test[:4]))[:, 1].numpy().ravel()
    np.testing.assert_allclose(ours, model.predict(flat(test[:4])), atol=1e-3)
    assert (head.choice["k"], head.choice["bank"]) == (5, len(share))


def test_small_things_are_found_though_they_fill_no_patch(discs, samples, monkeypatch):
    """Where no patch is half full, plain votes find nothing, and val must give the background less weight."""
    train, val, test = rows_of(discs, "train", "val", "test")
    thin = samples.masks & (np.arange(64) % 8 < 3)  # three of eight columns
    sparse = replace(samples, masks=thin.astype(np.uint8))
    head = segmenters.train_head("knn", sparse, train, val)
    assert head.choice["background"] < 1
    monkeypatch.setattr(segmenters, "BACKGROUNDS", (1.0,))
    plain = segmenters.train_head("knn", sparse, train, val)
    values = [
        masks.mean_iou(masks.overlap(sparse.masks[test], segmenters.predict_masks(h, sparse, test)))
        for h in (head, plain)
    ]
    assert values[0] > values[1] + 0.2


def test_a_backbone_is_read_at_its_blocks(run_folder):
    assert spaced(12, 4) == [2, 5, 8, 11]
    assert spaced(24, 4) == [5, 11, 17, 23]
    assert spaced(2, 4) == [0, 1]
    encoder = load_encoder(str(run_folder), size=32)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    maps = block_maps(encoder)
    assert maps is not None
    x = encoder.model.patch_embed(((images / 255) - 0.5) / 0.25)
    x = encoder.model._pos_embed(x)
    for block, found in zip(encoder.model.blocks, maps(images), strict=True):
        x = block(x)
        own = torch.nn.functional.layer_norm(x[:, 3:], (24,))
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), own, atol=1e-4, rtol=1e-4)
    assert block_maps(load_encoder("histogram", size=32)) is None


def test_stages_and_transformers_models_show_their_blocks(tmp_path):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    stages = block_maps(load_encoder("random:resnet10t", size=64))
    assert stages is not None
    assert [x.shape[-1] for x in stages(images)] == [16, 8, 4, 2]
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    config = Dinov2Config(hidden_size=24, num_hidden_layers=8, num_attention_heads=3, image_size=64, patch_size=16)
    Dinov2Model(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    maps = block_maps(encoder)
    assert maps is not None
    assert [x.shape for x in maps(images)] == [(2, 24, 4, 4)] * 4
    normal = encoder.model.layernorm  # fresh: weight 1, bias 0, so its output is the last block standardised
    assert float(normal.bias.abs().max()) == 0
    last = encoder.patches(images).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(maps(images)[-1], last, atol=1e-3, rtol=1e-3)


def test_the_result_is_complete(segment, discs, tmp_path):
    assert segment("--seeds", 0, 1, "--lr", 1e-2) == 0
    for name in segmenters.HEADS:
        result = results.read(tmp_path / "out" / f"segment_{name}" / "results.json")
        about, arrays = result.about, result.predictions()
        splits = {s: len(discs.select([s])) for s in ("train", "val", "test")}
        assert about["data"]["splits"] == splits
        assert about["data"]["groups"] == {"train": 20, "val": 6, "test": 10}
        assert about["data"]["classes"] == {"foreground": splits}
        assert about["cost"]["labels_used"] == {"train": [splits["train"]] * 2, "val": [splits["val"]] * 2}
        assert about["cost"]["seconds"] > 0
        assert about["selected"]["split"] == "val"
        assert [choice["seed"] for choice in about["selected"]["choices"]] == [0, 1]
        assert set(result.metrics) == {"iou", "dice", "iou_pooled", "dice_pooled"}
        assert arrays["iou"].shape == arrays["dice"].shape == (2, splits["test"], 1)
        found, truth = masks.unpack(arrays["masks"], 64), masks.unpack(arrays["truth"], 64)
        for run in range(2):
            for n in range(0, splits["test"], 5):
                expected = binary_jaccard_index(torch.from_numpy(found[run, n]), torch.from_numpy(truth[n]))
                assert arrays["iou"][run, n, 0] == pytest.approx(float(expected), abs=1e-6)
        for n, number in enumerate(arrays["number"]):
            np.testing.assert_array_equal(truth[n], masks.read_pair(discs, int(number), 64)[1])
        assert set(arrays["number"]) == set(discs.select(["test"]))
        counts = arrays["counts"].reshape(2, splits["test"], -1)
        again = metrics.bootstrap(arrays["number"], counts, arrays["group"], masks.overlap_metrics(["foreground"]))
        for metric, interval in again.items():
            assert interval.low == pytest.approx(result.metrics[metric].low)
            assert interval.value == pytest.approx(result.metrics[metric].value)
        html = (tmp_path / "out" / f"segment_{name}" / "report.html").read_text()
        look(tmp_path / "out" / f"segment_{name}" / "report.html")
        assert f"{result.metrics['dice'].value:.3f}" in html
        assert html.count("data:image/png") >= 6
        assert "Not shown" in html


def test_classes_of_a_mask_are_told_apart(segment, tmp_path):
    data = make(tmp_path / "rims", rim=True).root
    options = ["--heads", "linear", "--mask-classes", "disc", "rim", "--lr", 3e-2]
    assert segment(*options, data=data, backbone="histogram") == 0
    result = results.read(tmp_path / "out" / "segment_linear" / "results.json")
    assert {"iou", "iou_disc", "iou_rim", "dice_rim"} < set(result.metrics)
    arrays = result.predictions()
    each = np.nanmean(arrays["iou"][0], axis=0)
    assert result.metrics["iou_rim"].value == pytest.approx(each[1], abs=1e-6)
    assert result.metrics["iou"].value == pytest.approx(each.mean(), abs=1e-6)
    assert each.min() > 0.3
    assert list(result.about["data"]["classes"]) == ["disc", "rim"]


def test_fewer_masks_by_whole_groups_and_bare_images_counted(segment, tmp_path, capsys):
    data = make(tmp_path / "bare", without=4)
    options = ["--heads", "knn", "--labels", 0.25]
    assert segment(*options, data=data.root, backbone="histogram") == 0
    about = results.read(tmp_path / "out" / "segment_knn" / "results.json").about
    assert about["data"]["splits"]["test"] == len(data.select(["test"])) - 4
    assert any("without a mask are left out: 4 of test" in note for note in about["notes"])
    assert about["cost"]["labels_used"]["train"][0] == pytest.approx(30 / 4, abs=2)


def test_what_cannot_be_done_is_said(segment, index, discs, tmp_path, capsys):
    def error(*options, **where):
        assert segment(*options, **where) == 2
        return capsys.readouterr().err

    assert "no mask in split 'train' (" in error(data=index.root)
    assert "shows no blocks" in error("--heads", "upernet", backbone="histogram")
    assert "class labels" in error("--positive", "x")
    assert "--labels" in error("--labels", 0)
    assert "multiple of 8" in error("--size", 60, backbone="histogram")
    assert "every --lr above 0" in error("--lr", 0)
    assert "has no source 'x'" in error("--source", "x")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no blocks"):
        collect(load_encoder("histogram", size=64), discs, np.arange(2))
    assert segment("--heads", "knn", backbone="histogram") == 0
    assert "choose another --out" in error("--heads", "knn")
    named = error("--heads", "knn", "--mask-classes", "disc", backbone="histogram")
    assert "at 64 px with 100% of the labels and the mask classes foreground: choose another --out" in named


def test_upernet_is_left_out_where_there_are_no_blocks(segment, tmp_path):
    assert segment(backbone="histogram") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["segment_knn", "segment_linear"]
