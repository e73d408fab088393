"""Stochastic depth that skips work: right in the mean, less work, the same draws from the same seed."""

from __future__ import annotations

import pytest
import torch

from hybridssl import depth
from hybridssl.backbone import BackboneOptions, Crops, build

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
LAYOUT = ((5, 2), (3, 4))  # 10 + 12 tokens
FAMILIES = ("vit_tiny_patch16_224", "vit_small_patch16_dinov3")


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.4])
def test_the_mean_over_draws_is_the_whole(drop: float) -> None:
    torch.manual_seed(0)
    x, out = torch.randn(22, 3), torch.randn(22, 3)
    total = torch.zeros_like(x)
    for _ in range(500):
        drawn = depth.draw(LAYOUT, drop, x)
        total += depth.residual(x, drawn, lambda t, drawn=drawn: out if drawn.rows is None else out[drawn.rows])
    four_deviations = 4 * (drop / (1 - drop) / 500) ** 0.5  # of the mean of 500 draws: less than `drop` itself
    torch.testing.assert_close(total / 500 - x, out, rtol=four_deviations, atol=1e-3)


def test_a_subset_holds_whole_samples_of_every_length_and_scales_by_their_share() -> None:
    x = torch.arange(22.0)[:, None]
    seen = set()
    for _ in range(50):
        layout, scale, rows, samples = depth.draw(LAYOUT, 0.4, x)
        assert layout == ((3, 2), (2, 4))  # of 5 and of 3
        assert scale.flatten().tolist() == pytest.approx([5 / 3] * 6 + [3 / 2] * 8)
        wholes = [rows[:6].view(3, 2), rows[6:].view(2, 4) - 10]
        for whole, chosen, length in zip(wholes, samples, (2, 4), strict=True):
            assert torch.equal(whole, chosen[:, None] * length + torch.arange(length))
            assert len(set(chosen.tolist())) == len(chosen)
        seen |= set(rows.tolist())
    assert seen == set(range(22))  # none is left out always
    assert depth.draw(((1, 2),), 0.9, x).layout == ((1, 2),)  # the last one stays


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shared", [True, False])
def test_blocks_compute_a_share_of_the_samples_in_training_alone(name: str, shared: bool) -> None:
    network = build(BackboneOptions(name=name, args=SMALL, drop_path=0.5), 3, 32)
    network.packed = shared
    rows: list[int] = []
    network.model.blocks[1].mlp.register_forward_hook(
        lambda module, given, out: rows.append(given[0].shape[:-1].numel())
    )
    tokens = sum(n * (side**2 + network.prefix) for n, side in ((4, 4), (8, 2)))
    masks = torch.zeros(4, 16, dtype=torch.bool)
    masks[:, :4] = True
    crops = [Crops(torch.randn(4, 3, 32, 32)), Crops(torch.randn(8, 3, 16, 16))]
    network.see(crops)
    assert sum(rows) == tokens // 2
    rows.clear()
    network.eval().see(crops)
    assert sum(rows) == tokens
    network.train().see([*crops, Crops(torch.randn(4, 3, 32, 32), masks, left_out=True)])  # each with its own positions


def test_one_seed_draws_the_same_twice_and_another_one_differently() -> None:
    network = build(BackboneOptions(name=FAMILIES[0], args=SMALL, drop_path=0.5), 3, 32)
    images, seen = torch.randn(8, 3, 32, 32), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(network(images).cls)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
