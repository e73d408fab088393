from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from finetune import features
from finetune.backbones import load
from finetune.features import extract
from shards.errors import DataError


@pytest.fixture(scope="module")
def encoder(export_folder):
    return load(str(export_folder))


def forbidden(images):
    raise AssertionError("computed again")


def test_features_are_those_of_the_images_in_the_order_asked(index, encoder):
    numbers = np.array([7, 2, 11])
    found = extract(encoder, index, numbers)
    pictures = [features._Images(index, numbers, encoder.input_size)[i][1] for i in range(3)]
    expected = encoder.features(torch.from_numpy(np.stack(pictures)))
    for kind in ("cls", "patch_mean"):
        np.testing.assert_allclose(found.x[kind], expected[kind].numpy(), atol=1e-6)
    assert found.numbers.tolist() == [7, 2, 11]
    assert [index.classes[k] for k in found.label] == [index.read(i).labels[0] for i in (7, 2, 11)]


def test_cache_gives_the_same_numbers_without_computing(index, encoder, tmp_path):
    first = extract(encoder, index, np.arange(20), cache=tmp_path)
    again = extract(replace(encoder, tokens=forbidden), index, np.arange(20), cache=tmp_path)
    np.testing.assert_array_equal(again.x["cls"], first.x["cls"])
    np.testing.assert_array_equal(again.y, first.y)
    with pytest.raises(AssertionError, match="computed again"):
        extract(replace(encoder, tokens=forbidden, sha256="other"), index, np.arange(20), cache=tmp_path)


def test_cache_grows_by_what_is_missing(index, encoder, tmp_path):
    seen = []

    def counting(images):
        seen.append(len(images))
        return encoder.tokens(images)

    extract(encoder, index, np.arange(10), cache=tmp_path)
    more = extract(replace(encoder, tokens=counting), index, np.arange(5, 25)[::-1], cache=tmp_path)
    assert sum(seen) == 15
    whole = extract(encoder, index, np.arange(5, 25)[::-1])
    np.testing.assert_array_equal(more.numbers, whole.numbers)
    np.testing.assert_allclose(more.x["cls"], whole.x["cls"], atol=1e-6)


def test_damaged_cache_is_computed_again(index, encoder, tmp_path):
    first = extract(encoder, index, np.arange(6), cache=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-40])
    np.testing.assert_allclose(extract(encoder, index, np.arange(6), cache=tmp_path).x["cls"], first.x["cls"])


def test_workers_do_not_change_features(index, encoder):
    alone, two = (extract(encoder, index, np.arange(30), batch=8, workers=w) for w in (0, 2))
    np.testing.assert_array_equal(alone.x["cls"], two.x["cls"])


def test_an_image_that_does_not_decode_is_left_out_and_named(index, encoder, tmp_path, monkeypatch):
    broken, whole = index.read(4).image, features.decode

    def decode(data, *arguments):
        if data == broken:
            raise DataError("damaged png image")
        return whole(data, *arguments)

    monkeypatch.setattr(features, "decode", decode)
    found = extract(encoder, index, np.arange(8), cache=tmp_path)
    assert found.numbers.tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert len(found.x["cls"]) == len(found.y) == len(found.group) == 7
    assert found.bad == [{"key": index.key(4), "shard": index.shard_of(4)[0], "reason": "damaged png image"}]
    with pytest.raises(DataError, match="none of the 1 images"):
        extract(encoder, index, np.array([4]))


def test_images_without_a_group_are_groups_of_their_own(new_index, table):
    alone = new_index([{**row, "group": ""} for row in table[:6]])
    assert len(set(features.groups_of(alone, np.arange(6)))) == 6


def test_channels_must_fit(index, encoder):
    with pytest.raises(DataError, match="takes 1 channels"):
        extract(replace(encoder, channels=1), index, np.arange(2))
