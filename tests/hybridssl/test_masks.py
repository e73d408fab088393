from __future__ import annotations

import numpy as np
import pytest

from hybridssl.masks import draw_mask, mask_counts
from hybridssl.views import ViewOptions, crop, generator

SHAPES = ("block", "random", "inverse_block")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (1, 7), (7, 1), (4, 4), (5, 9), (16, 16)])
def test_every_count_is_met_exactly(grid: tuple[int, int], shape: str) -> None:
    patches = grid[0] * grid[1]
    for count in range(patches + 1):
        mask = draw_mask(np.random.default_rng(count), grid, count, shape)
        assert mask.shape == (patches,)
        assert mask.dtype == bool
        assert mask.sum() == count


@pytest.mark.parametrize("shape", SHAPES)
def test_a_count_beyond_the_grid_is_refused(shape: str) -> None:
    with pytest.raises(ValueError, match="5 of 2 x 2"):
        draw_mask(np.random.default_rng(0), (2, 2), 5, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_view_is_masked_by_its_options_and_its_generator(shape: str) -> None:
    options = ViewOptions(
        global_size=64, local_count=0, mask_probability=1.0, mask_ratio=(0.75, 0.75), mask_shape=shape
    )
    image = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    first, again, other = (crop(image, generator(0, 0, sample), options, 8, 5).masks for sample in (3, 3, 4))
    assert first.sum(1).tolist() == [48, 48]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    if shape == "inverse_block":  # what is seen hangs together: every patch has a neighbour, round the edge if need be
        seen = ~first[0].reshape(8, 8)
        beside = np.stack([np.roll(seen, step, axis) for step in (1, -1) for axis in (0, 1)]).any(0)
        assert beside[seen].all()


def test_random_masks_hide_every_patch_alike_and_independently() -> None:
    masks = np.stack([draw_mask(np.random.default_rng(i), (8, 8), 48, "random") for i in range(1000)])
    assert np.abs(masks.mean(0) - 0.75).max() < 0.06  # four standard errors
    squares = masks.reshape(-1, 8, 8)
    joined = (squares[:, 1:] & squares[:, :-1]).mean()
    assert joined == pytest.approx(48 / 64 * 47 / 63, abs=0.01)


def test_inverse_block_masks_show_one_rectangle_and_every_patch_alike() -> None:
    masks = np.stack([draw_mask(np.random.default_rng(i), (8, 8), 48, "inverse_block") for i in range(1000)])
    assert np.abs(masks.mean(0) - 0.75).max() < 0.06
    for mask in masks[:50]:
        seen = ~mask.reshape(8, 8)
        # some turn of the torus brings the 16 visible patches into the smallest box
        sides = [
            (np.ptp(np.nonzero(turned)[0]) + 1, np.ptp(np.nonzero(turned)[1]) + 1)
            for turned in (np.roll(seen, (y, x), (0, 1)) for y in range(8) for x in range(8))
        ]
        h, w = min(sides, key=lambda side: side[0] * side[1])
        assert h * w - 16 < h  # full but for a part of the last column
        assert 1 / 2.5 < h / w < 2.5


def test_masks_come_in_blocks_and_reach_the_borders() -> None:
    masks = np.stack([draw_mask(np.random.default_rng(i), (16, 16), 64) for i in range(400)]).reshape(-1, 16, 16)
    joined = (masks[:, 1:] & masks[:, :-1]).sum() + (masks[:, :, 1:] & masks[:, :, :-1]).sum()
    # of 480 neighbouring pairs, single patches at random would hide (1/4)^2 together: 30
    assert joined / len(masks) > 75
    share = masks.mean(0)
    assert share.min() > 0.05
    assert share.max() < 0.4


def test_half_of_the_views_are_masked_and_each_batch_covers_the_range() -> None:
    for start in (0, 12_345, 10**9):
        counts = np.array([mask_counts(p, 10_000, 0.5, (0.1, 0.5)) for p in range(start, start + 64)])
        for view in counts.T:  # 64 positions
            masked = view[view > 0]
            assert abs(len(masked) - 32) <= 2
            histogram, _ = np.histogram(masked, bins=4, range=(1000, 5000))
            assert histogram.sum() == len(masked)
            assert histogram.min() >= 6
            assert histogram.max() <= 10
        both = (counts > 0).all(1).sum()  # the two views of an image are masked independently of each other
        assert 12 <= both <= 20


def test_counts_are_rounded_shares_and_a_function_of_the_position() -> None:
    root = 1.32471795724  # of x^3 = x + 1
    u = [(0.5 + 8 * step) % 1 for step in (1 / root, 1 / root**2)]  # place 7 is the eighth
    share = [0.1 + 0.4 * v / 0.5 if v < 0.5 else 0.0 for v in u]
    assert mask_counts(7, 196, 0.5, (0.1, 0.5)) == [round(s * 196) for s in share]
    assert {c for p in range(50) for c in mask_counts(p, 196, 1.0, (0.3, 0.3))} == {round(0.3 * 196)}
    assert {c for p in range(50) for c in mask_counts(p, 196, 0.0, (0.1, 0.5))} == {0}
    assert {c for p in range(50) for c in mask_counts(p, 4, 1.0, (0.5, 1.0))} == {2, 3, 4}
