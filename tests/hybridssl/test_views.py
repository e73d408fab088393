from __future__ import annotations

import functools
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

from hybridssl import colour
from hybridssl.errors import UserError
from hybridssl.views import (
    Crops,
    Item,
    ViewOptions,
    channel_means,
    collate,
    crop,
    draw_box,
    draw_clean_box,
    generator,
    normalise,
    planes,
    render,
    resize,
    resize_for_eval,
)

SMALL = ViewOptions(global_size=32, local_size=16, local_count=3)
PLAIN = ViewOptions(
    global_size=32, local_size=16, local_count=3, hflip=0, vflip=0, jitter=0, grayscale=0, solarize=0, blur=(0, 0, 0)
)


@functools.cache
def photograph(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Noise with the 1/f spectrum of photographs: detail at every scale."""
    rng = np.random.default_rng(seed)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    radius[0, 0] = 1
    planes = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / radius).real for _ in range(channels)]
    image = np.stack(planes, -1)
    return (128 + 45 * (image - image.mean()) / image.std()).clip(0, 255).astype(np.uint8)


def items(n: int, options: ViewOptions = SMALL, channels: int = 3, clean: bool = True) -> list[Item]:
    out = []
    for i in range(n):
        image = photograph(50, 60, channels, seed=i)
        crops = crop(image, generator(0, 0, i), options, 8, i, clean)
        labels = np.zeros(5, np.uint8)
        labels[i % 5] = 1
        bad = [{"key": "broken", "shard": "a.tar", "reason": "truncated"}] if i == 1 else []
        out.append(Item(crops, labels, source=i - 1, labelled=i > 0, text=f"text {i}", key=f"key {i}", bad=bad))
    return out


# geometry


def pillow(image: np.ndarray, size: int, how: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
    """float [size, size(, C)]: Pillow widens its filter with the factor, so nothing aliases."""
    return np.asarray(Image.fromarray(image).resize((size, size), how)).astype(float)


@pytest.mark.parametrize("side", [150, 224, 240, 300, 448, 520, 1024])
def test_resize_agrees_with_pillow(side: int) -> None:
    image = photograph(side, side)
    out = resize(image, 224)
    filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)  # which differ by 2.5 to 3 of 255 on this noise
    expected = min((pillow(image, 224, how) for how in filters), key=lambda picture: np.abs(out - picture).mean())
    assert out.shape == (224, 224, 3)
    assert out.dtype == np.uint8
    assert np.abs(out - expected).mean() < (4.5 if side == 448 else 3.2)  # a plain halving is sharper than either
    shifted = np.abs(out[:, 1:] - expected[:, :-1]).mean()
    assert shifted > 3 * np.abs(out - expected).mean()


@pytest.mark.parametrize("side", [240, 260, 300, 400, 447, 520, 600, 1024])
def test_a_zone_plate_does_not_alias(side: int) -> None:
    """Rings finer than the output can show must come out as grey, and not as coarse rings."""
    y, x = np.mgrid[:side, :side] - side / 2
    plate = (127.5 + 120 * np.cos(np.pi * (x**2 + y**2) / side)).round().astype(np.uint8)
    c = np.arange(224) + 0.5 - 112
    radius = np.hypot(c[:, None], c[None]) / 112  # ring frequency: radius / 2 cycles a source pixel
    beyond = (radius > min(1.25 * 224 / side, 0.95)) & (radius < 1)
    left, reference = resize(plate[..., None], 224)[..., 0][beyond].std(), pillow(plate, 224)[beyond].std()
    assert left < reference + 10  # without a filter 8 to 55 more
    if side >= 300:
        assert left < 85 / 3  # a third of what the rings carry


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("side", [20, 70, 200])
def test_channels_are_resized_alike(channels: int, side: int) -> None:
    image = photograph(side, side, channels)
    alone = np.concatenate([resize(np.ascontiguousarray(image[..., [c]]), 64) for c in range(channels)], -1)
    assert np.abs(resize(image, 64).astype(int) - alone).max() <= 2  # the roundings of OpenCV's code paths differ


def test_boxes_lie_in_the_image_and_follow_scale_and_aspect() -> None:
    rng = np.random.default_rng(0)
    shares, ratios = [], []
    for _ in range(500):
        top, left, h, w = draw_box(rng, 200, 260, (0.1, 0.5), (3 / 4, 4 / 3))
        assert 0 <= top <= 200 - h
        assert 0 <= left <= 260 - w
        shares.append(h * w / (200 * 260))
        ratios.append(w / h)
    assert 0.095 < min(shares) < 0.12
    assert 0.47 < max(shares) < 0.51
    assert abs(np.mean(shares) - 0.3) < 0.02
    assert 0.73 < min(ratios) < 0.78
    assert 1.28 < max(ratios) < 1.36


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 400), (400, 1), (10, 100), (7, 5)])
def test_small_and_long_images_crop(height: int, width: int) -> None:
    image = np.full((height, width, 3), 77, np.uint8)
    crops = crop(image, generator(0, 0, 0), SMALL, 8, 0)
    assert crops.clean is not None
    assert (crops.global_ == 77).all()
    assert (crops.local == 77).all()
    assert (crops.clean == 77).all()


def test_crops_are_cut_from_the_drawn_box() -> None:
    image = photograph(120, 160)
    options = PLAIN
    rng = generator(3, 1, 4)
    crops = crop(image, generator(3, 1, 4), options, 8, 0)
    scales = [options.global_scale] * 2 + [options.local_scale] * len(crops.local)
    assert len(scales) > 2
    for view, scale in zip([*crops.global_, *crops.local], scales, strict=True):
        top, left, h, w = draw_box(rng, 120, 160, scale, options.aspect)
        rng.random(2)  # whether to flip
        box, size = (left, top, left + w, top + h), (view.shape[1],) * 2
        pillow = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, box=box)
        assert np.abs(view.transpose(1, 2, 0) - np.asarray(pillow).astype(float)).mean() < 10


def test_flips_mirror_the_crop() -> None:
    image = photograph(64, 64)
    still = crop(image, generator(0, 0, 0), ViewOptions(global_size=32, local_count=0, hflip=0, vflip=0), 8, 0)
    for across, down in ((1, 0), (0, 1), (1, 1)):
        options = ViewOptions(global_size=32, local_count=0, hflip=across, vflip=down)
        flipped = crop(image, generator(0, 0, 0), options, 8, 0)
        assert np.array_equal(flipped.global_[:, :, :: -1 if down else 1, :: -1 if across else 1], still.global_)


def test_the_clean_box_stays_in_the_square_that_evaluation_sees() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        top, left, side = draw_clean_box(rng, 100, 160, (0.8, 1.0))
        assert 89 <= side <= 100
        assert 0 <= top <= 100 - side
        assert 30 <= left <= 130 - side


def test_evaluation_sees_the_centred_square() -> None:
    image = photograph(100, 150)
    pillow = Image.fromarray(image[:, 25:125]).resize((64, 64), Image.Resampling.BICUBIC)
    out = resize_for_eval(image, 64)
    assert out.shape == (3, 64, 64)
    assert out.flags.c_contiguous
    assert np.abs(out.transpose(1, 2, 0) - np.asarray(pillow).astype(float)).mean() < 4


@pytest.mark.parametrize("side", [256, 512])
@pytest.mark.parametrize("size", [224, 96])
def test_a_whole_view_is_torchvisions(side: int, size: int) -> None:
    """Crop, flip, brightness, contrast, saturation, blur, solarisation: the same parameters, the same picture.

    Hue is left out: ours keeps luma, torchvision's the largest channel (test_colour.py).
    """
    image, (top, left, h, w) = photograph(side, side), (side // 8, side // 5, side // 2, round(0.6 * side))
    b, c, s, sigma = 1.2, 0.8, 1.1, 1.3
    x = TF.to_image(Image.fromarray(image))
    x = TF.horizontal_flip(TF.resized_crop(x, top, left, h, w, [size, size], antialias=True)).float() / 255
    x = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(x, b), c), s)
    x = TF.solarize(TF.gaussian_blur(x, [13, 13], [sigma, sigma]), colour.SOLARIZE_AT)

    crops = planes([resize(image[top : top + h, left : left + w], size)[:, ::-1]], size, 3)
    linear, bias = colour.affine(channel_means(crops), *(np.array([v]) for v in (b, c, s, 0.0)), np.array([False]))
    numbers = np.concatenate([linear.reshape(1, 9), bias, [[colour.SOLARIZE_AT, sigma]]], 1, dtype=np.float32)

    def distance(numbers: np.ndarray) -> float:
        return 255 * float((colour.apply(torch.from_numpy(crops), torch.from_numpy(numbers), 2.0)[0] - x).abs().mean())

    assert distance(numbers) < 2  # of 255
    brighter = numbers * np.r_[np.full(9, 1.2), np.ones(5)].astype(np.float32)
    assert distance(brighter) > 3 * distance(numbers)


# randomness


def equal(a: Crops, b: Crops) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in vars(a))


def test_the_same_three_numbers_give_the_same_bytes() -> None:
    image = photograph(80, 90)
    first = crop(image, generator(5, 2, 9), SMALL, 8, 40)
    np.random.seed(0)  # global state must not matter
    assert equal(first, crop(image, generator(5, 2, 9), SMALL, 8, 40))
    for other in ((6, 2, 9), (5, 3, 9), (5, 2, 10), (2, 5, 9)):
        assert not np.array_equal(first.global_, crop(image, generator(*other), SMALL, 8, 40).global_)


def test_the_clean_view_changes_no_other_view() -> None:
    image = photograph(80, 90)
    with_clean, without = (crop(image, generator(0, 0, 0), SMALL, 8, 0, clean) for clean in (True, False))
    assert without.clean is None
    assert all(np.array_equal(getattr(with_clean, n), getattr(without, n)) for n in vars(without) if n != "clean")


def test_what_is_left_out_is_drawn_beside_the_masks_and_changes_nothing_else() -> None:
    image, options = photograph(80, 90), replace(SMALL, left_out=0.4, mask_probability=0.5)
    masked, unmasked = 0, 0
    for position in range(20):
        with_it = crop(image, generator(0, 0, position), options, 8, position)
        without = crop(image, generator(0, 0, position), replace(options, left_out=0.0), 8, position)
        assert without.left_out is None
        assert all(np.array_equal(getattr(with_it, n), getattr(without, n)) for n in vars(without) if n != "left_out")
        assert with_it.left_out is not None
        for mask, left_out in zip(with_it.masks, with_it.left_out, strict=True):
            masked, unmasked = masked + mask.any(), unmasked + (not mask.any())
            assert left_out.sum() == (0 if mask.any() else 6)  # of 16
    assert masked + unmasked == 40
    assert min(masked, unmasked) > 15
    everything = crop(image, generator(0, 0, 0), replace(options, left_out=0.99, mask_probability=0), 8, 0)
    assert everything.left_out is not None
    assert everything.left_out.sum(1).tolist() == [15, 15]  # one is always shown


# batches and rendering


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_shapes(channels: int) -> None:
    options = ViewOptions(global_size=32, local_size=16, local_count=3, mean=(0.5,), std=(0.25,))
    batch = collate(items(4, options, channels))
    assert batch.global_.shape == (2, 4, channels, 32, 32)
    assert batch.global_.dtype == torch.uint8
    assert batch.local.shape == (3, 4, channels, 16, 16)
    assert batch.clean.shape == (4, channels, 32, 32)
    assert batch.colour.shape == (5, 4, colour.size(channels))
    assert batch.colour.dtype == torch.float32
    assert batch.masks.shape == (2, 4, 16)
    assert batch.masks.dtype == torch.bool
    views = render(batch, options)
    assert views.local is not None
    assert views.clean is not None
    assert views.global_.shape == (8, channels, 32, 32)
    assert views.local.shape == (12, channels, 16, 16)
    assert views.clean.shape == (4, channels, 32, 32)
    assert views.global_.dtype == views.local.dtype == views.clean.dtype == torch.float32
    assert views.global_.isfinite().all()
    assert views.global_.abs().max() <= 2


def test_collate_keeps_what_comes_with_the_crops() -> None:
    batch = collate(items(4))
    assert len(batch) == 4
    assert batch.labels.tolist() == np.eye(5, dtype=int)[:4].tolist()
    assert batch.labels.dtype == torch.uint8
    assert batch.source.tolist() == [-1, 0, 1, 2]
    assert batch.source.dtype == torch.int64
    assert batch.labelled.tolist() == [False, True, True, True]
    assert batch.text[2] == "text 2"
    assert batch.keys[3] == "key 3"
    assert batch.bad == [{"key": "broken", "shard": "a.tar", "reason": "truncated"}]


def test_without_local_and_clean_views() -> None:
    options = ViewOptions(global_size=32, local_count=0)
    batch = collate(items(2, options, clean=False))
    assert batch.local.shape[:2] == (0, 2)
    assert batch.clean.shape == (0, 3, 32, 32)
    views = render(batch, options)
    assert views.local is None
    assert views.clean is None
    assert len(views.global_) == 4


def test_only_the_images_that_need_a_clean_view_carry_one() -> None:
    batch = collate([*items(1, clean=False), *items(1)])
    assert batch.clean.shape == (1, 3, 32, 32)
    assert batch.clean_of is not None
    assert batch.clean_of.tolist() == [1]


def test_views_are_outermost() -> None:
    made = items(3, PLAIN)
    views = render(collate(made), PLAIN)
    assert views.local is not None
    assert views.clean is not None
    for i, item in enumerate(made):
        for v in range(2):
            expected = normalise(torch.from_numpy(item.crops.global_[[v]]), PLAIN.mean, PLAIN.std)[0]
            assert (views.global_[v * 3 + i] - expected).abs().max() < 1e-5
        for v in range(3):
            expected = normalise(torch.from_numpy(item.crops.local[[v]]), PLAIN.mean, PLAIN.std)[0]
            assert (views.local[v * 3 + i] - expected).abs().max() < 1e-5
        assert item.crops.clean is not None
        expected = normalise(torch.from_numpy(item.crops.clean[None]), PLAIN.mean, PLAIN.std)[0]
        assert torch.equal(views.clean[i], expected)


def test_the_colours_of_each_view_are_its_own() -> None:
    batch = collate(items(3))
    views = render(batch, SMALL)
    alone = colour.apply(batch.global_[1, 2:3], batch.colour[1, 2:3], SMALL.blur_sigma[1])
    expected = (alone - torch.tensor(SMALL.mean).view(3, 1, 1)) / torch.tensor(SMALL.std).view(3, 1, 1)
    assert (views.global_[1 * 3 + 2] - expected[0]).abs().max() < 1e-5


def test_rendering_is_float32_even_under_autocast() -> None:
    batch = collate(items(2))
    plain = render(batch, SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = render(batch, SMALL)
    assert torch.equal(plain.global_, cast.global_)
    untouched = collate(items(2))
    assert torch.equal(batch.global_, untouched.global_)  # the batch is read, not written


def test_an_item_survives_the_way_between_processes() -> None:
    item = items(2)[1]
    back = pickle.loads(pickle.dumps(item))
    assert equal(item.crops, back.crops)
    assert np.array_equal(item.labels, back.labels)
    assert (back.source, back.labelled, back.text, back.key, back.bad) == (0, True, "text 1", "key 1", item.bad)


# options


def test_a_size_that_the_patch_does_not_divide_names_the_next_one() -> None:
    with pytest.raises(UserError, match=r"views\.local_size=96 .* 14: try 98"):
        ViewOptions().grid(14)
    assert ViewOptions().grid(16) == (14, 14)
    assert ViewOptions(local_count=0).grid(14) == (16, 16)


@pytest.mark.parametrize(("patch", "sizes"), [(16, (112, 48)), (14, (112, 56)), (32, (128, 64))])
def test_half_the_size_is_whole_patches(patch: int, sizes: tuple[int, int]) -> None:
    small = ViewOptions(local_size=96 if 96 % patch == 0 else 98, blur_sigma=(0.2, 2.0)).halved(patch)
    assert (small.global_size, small.local_size) == sizes
    assert small.grid(patch)[0] == sizes[0] // patch
    assert small.blur_sigma == (0.1, 1.0)


def test_half_of_a_tiny_view_is_refused() -> None:
    with pytest.raises(UserError, match=r"views\.curriculum=0\.5: half of .*=32 is a single patch of 16"):
        ViewOptions(global_size=32, local_size=16, curriculum=0.5).halved(16)


def test_whether_all_views_hide_as_many_patches() -> None:
    equal = ViewOptions(mask_probability=1, mask_ratio=(0.75, 0.75))
    assert equal.hides_equally(16)
    assert not replace(equal, mask_probability=0.5).hides_equally(16)
    assert not replace(equal, mask_ratio=(0.7, 0.8)).hides_equally(16)
    assert not replace(equal, mask_ratio=(0.0, 0.0)).hides_equally(16)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hflip", 1.5),
        ("curriculum", 1.0),
        ("left_out", 1.0),
        ("global_scale", (0.9, 0.1)),
        ("blur", (1.0, 0.1)),
        ("std", (0.2, 0.0)),
        ("local_count", -1),
    ],
)
def test_an_option_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"views\.{name}="):
        ViewOptions(**{name: value})  # type: ignore[arg-type]


def test_statistics_must_fit_the_channels() -> None:
    with pytest.raises(UserError, match=r"views\.mean has 3 numbers, the images 5 channels"):
        normalise(torch.zeros(1, 5, 4, 4, dtype=torch.uint8), ViewOptions().mean, ViewOptions().std)


def test_the_decoder_is_asked_for_enough_pixels() -> None:
    side = ViewOptions().decode_at_least()
    assert np.sqrt(0.05) * side >= 96
    assert np.sqrt(0.32) * side >= 224
    assert side <= 430
