from __future__ import annotations

import numpy as np
import pytest
import torch

from hybridssl.assign import Centre, sinkhorn


def naive_sinkhorn(scores: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """SwAV's algorithm entry by entry, with its constants: prototypes carry 1/K each, samples 1/N each."""
    n, k = scores.shape
    q = np.exp(scores.astype(np.float64) / temperature)
    q /= q.sum()
    for _ in range(iterations):
        for j in range(k):
            q[:, j] /= q[:, j].sum() * k
        for i in range(n):
            q[i] /= q[i].sum() * n
    return q * n


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("temperature", [0.04, 0.5])
def test_sinkhorn_equals_the_naive_loop(iterations: int, temperature: float) -> None:
    scores = torch.rand(11, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = naive_sinkhorn(scores.numpy(), temperature, iterations)
    np.testing.assert_allclose(sinkhorn(scores, temperature, iterations).numpy(), expected, rtol=2e-4, atol=1e-7)


def test_sinkhorn_balances_prototypes_and_normalises_samples() -> None:
    scores = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) + torch.arange(8)
    q = sinkhorn(scores, 0.5, iterations=50)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(q.sum(dim=0), torch.full((8,), 8.0), rtol=1e-3, atol=1e-3)


def test_sinkhorn_survives_huge_scores_and_no_rows() -> None:
    huge = sinkhorn(torch.tensor([[1e4, 0.0], [0.0, 1e4], [5.0, 5.0]]), 0.04)
    assert torch.isfinite(huge).all()
    assert sinkhorn(torch.empty(0, 4), 0.1).shape == (0, 4)


def test_sinkhorn_computes_in_float32_under_autocast() -> None:
    scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        q = sinkhorn(scores, 0.1)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q, sinkhorn(scores.float(), 0.1))


def test_centre_equals_the_equation_over_three_steps() -> None:
    centre, c = Centre(4, momentum=0.8), np.zeros(4)
    for seed in range(3):
        scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        x = scores.double().numpy()
        e = np.exp((x - c) / 0.07)
        np.testing.assert_allclose(centre(scores, 0.07).numpy(), e / e.sum(1, keepdims=True), rtol=1e-4, atol=1e-7)
        c = 0.8 * c + 0.2 * x.mean(0)
        np.testing.assert_allclose(centre.value.numpy(), c, rtol=1e-5)


def test_centre_stays_when_there_is_no_row() -> None:
    centre = Centre(3)
    centre.value.fill_(2.0)
    assert centre(torch.empty(0, 3), 0.1).shape == (0, 3)
    assert centre.value.tolist() == [2.0, 2.0, 2.0]
