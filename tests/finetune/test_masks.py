"""Masks: the grid they are read on, and overlap held to torchmetrics and scikit-learn."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score, jaccard_score
from torchmetrics.segmentation import MeanIoU

from finetune import masks, metrics
from hybridssl.views import resize_for_eval
from shards.errors import DataError
from tests.finetune.masked import make


@pytest.fixture
def pair():
    """Truth and prediction uint8 [20, 16, 16] of three classes and background, each class absent now and then."""
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 4, (20, 4, 4)).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    found = np.where(rng.random(truth.shape) < 0.3, rng.integers(0, 4, truth.shape), truth).astype(np.uint8)
    truth[:6][truth[:6] == 3] = 0
    found[:3][found[:3] == 3] = 0
    return truth, found


def png(array):
    return cv2.imencode(".png", array)[1].tobytes()


def test_overlap_of_one_image_is_that_of_scikit_learn(pair):
    counts = masks.overlap(*pair, 3)
    for k in range(3):
        for n in range(6, 20):
            sides = [(m[n] == k + 1).ravel() for m in pair]
            assert masks.iou(counts)[n, k] == pytest.approx(jaccard_score(*sides))
            assert masks.dice(counts)[n, k] == pytest.approx(f1_score(*sides))
    assert np.isnan(masks.iou(counts)[:3, 2]).all()  # in neither
    assert (masks.iou(counts)[3:6, 2] == 0).all()  # false alarms


def test_pooled_overlap_is_that_of_scikit_learn_on_all_pixels(pair):
    found = masks.overlap_metrics(["a", "b", "c"])
    counts = masks.overlap(*pair, 3).reshape(20, -1)
    flat = [m.ravel() for m in pair]
    one = np.ones((1, 20))
    value = found["iou_pooled"](one, counts, one)[0]
    assert value == pytest.approx(jaccard_score(*flat, labels=[1, 2, 3], average="macro"))
    assert found["dice_pooled"](one, counts, one)[0] == pytest.approx(
        f1_score(*flat, labels=[1, 2, 3], average="macro")
    )


def test_mean_over_images_is_that_of_torchmetrics(pair):
    planes = [torch.from_numpy(m == 1)[:, None].long() for m in pair]
    metric = MeanIoU(num_classes=1, include_background=True, input_format="one-hot")
    for truth, found in zip(*planes, strict=True):
        metric.update(found[None], truth[None])
    counts = masks.overlap((pair[0] == 1).astype(np.uint8), (pair[1] == 1).astype(np.uint8))
    assert masks.mean_iou(counts) == pytest.approx(float(metric.compute()), abs=1e-6)


def test_weights_are_copies_of_images(pair):
    counts = masks.overlap(*pair, 3).reshape(20, -1)
    times = np.random.default_rng(0).integers(0, 3, 20)
    copied, one = np.repeat(counts, times, axis=0), np.ones((1, times.sum()))
    for name, metric in masks.overlap_metrics(["a", "b", "c"]).items():
        weighted = metric(counts, counts, times[None].astype(float))
        assert weighted == pytest.approx(metric(copied, copied, one)), name


def test_intervals_resample_groups(pair):
    """Ten groups of two images alike say no more than ten images: the same interval."""
    counts = masks.overlap(*pair, 3)[:10].reshape(10, -1)
    found = masks.overlap_metrics(["a", "b", "c"])
    ten = metrics.bootstrap(counts, counts, np.arange(10), found, 200)
    twice = np.repeat(counts, 2, axis=0)
    pairs = metrics.bootstrap(twice, twice, np.repeat(np.arange(10), 2), found, 200)
    assert (pairs["iou"].low, pairs["iou"].high) == pytest.approx((ten["iou"].low, ten["iou"].high))
    assert ten["iou"].low < ten["iou"].value < ten["iou"].high


def test_bits_come_back(pair):
    for classes, size in ((1, 16), (3, 16), (3, 13)):
        m = np.where(pair[0] <= classes, pair[0], 0).reshape(2, 10, 16, 16)[..., :size, :size]
        bits = masks.pack(m, classes)
        assert bits.shape == (2, 10, classes, -(-size * size // 8))
        np.testing.assert_array_equal(masks.unpack(bits, size), m)


def test_a_mask_lies_on_its_image():
    """The same picture as image and as mask, of any shape, ends up on the same pixels."""
    mask = np.zeros((90, 150), np.uint8)
    mask[20:60, 60:120] = 255
    for size in (32, 45, 90, 128):
        grey = resize_for_eval(mask[..., None].repeat(3, 2), size)[0] > 127
        np.testing.assert_array_equal(masks.on_grid(png(mask), size)[grey], 1)
        assert masks.on_grid(png(mask), size).sum() == pytest.approx(grey.sum(), rel=0.06)


def test_instances_are_foreground_and_classes_need_names(tmp_path):
    instances = np.zeros((8, 8), np.uint16)
    instances[:4, :4], instances[4:, 4:] = 700, 3
    Image.fromarray(instances).save(tmp_path / "m.png")
    data = (tmp_path / "m.png").read_bytes()
    np.testing.assert_array_equal(masks.on_grid(data, 8), instances > 0)
    with pytest.raises(DataError, match="value 700, and only 2"):
        masks.on_grid(data, 8, ("a", "b"))
    values = np.arange(3, dtype=np.uint8).repeat(3).reshape(3, 3)
    np.testing.assert_array_equal(masks.on_grid(png(values), 3, ("a", "b")), values)


def test_a_mask_of_another_shape_is_refused(tmp_path):
    index = make(tmp_path)
    sample = index.read(0)
    index.read = lambda i: type(sample)(sample.key, sample.image, mask=png(np.ones((64, 32), np.uint8)))
    with pytest.raises(DataError, match="another shape"):
        masks.read_pair(index, 0, 32)
    index.read = lambda i: type(sample)(sample.key, sample.image, mask=png(np.ones((32, 32), np.uint8)))
    assert masks.read_pair(index, 0, 32)[1].all()  # smaller than its image: no harm
