from __future__ import annotations

import numpy as np
import pytest

from hybridssl.masks import draw_mask, mask_counts


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (1, 7), (4, 4), (5, 9), (16, 16)])
def test_every_count_is_met_exactly(grid: tuple[int, int]) -> None:
    patches = grid[0] * grid[1]
    for count in range(patches + 1):
        mask = draw_mask(np.random.default_rng(count), grid, count)
        assert mask.shape == (patches,)
        assert mask.dtype == bool
        assert mask.sum() == count


def test_a_count_beyond_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="5 of 2 x 2"):
        draw_mask(np.random.default_rng(0), (2, 2), 5)


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
    assert mask_counts(7, 196, 0.5, (0.1, 0.5)) == mask_counts(7, 196, 0.5, (0.1, 0.5))
    assert {c for p in range(50) for c in mask_counts(p, 196, 1.0, (0.3, 0.3))} == {round(0.3 * 196)}
    assert {c for p in range(50) for c in mask_counts(p, 196, 0.0, (0.1, 0.5))} == {0}
    assert {c for p in range(50) for c in mask_counts(p, 4, 1.0, (0.5, 1.0))} == {2, 3, 4}
