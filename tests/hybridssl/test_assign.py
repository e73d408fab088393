from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hybridssl import assign, fused
from hybridssl.assign import Centre, sinkhorn
from hybridssl.fused import Targets
from tests.hybridssl.dense import assigned


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


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


@pytest.fixture(params=["kept", "recomputed"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with room for all scores, once with room for a column or two."""
    if request.param == "recomputed":
        monkeypatch.setitem(fused.CHUNK, "cpu", 1)
        monkeypatch.setitem(assign.COLUMNS, "cpu", 2)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("temperature", [0.04, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.float64, 1e-11)])
def test_sinkhorn_equals_the_naive_loop(
    iterations: int, temperature: float, dtype: torch.dtype, tolerance: float
) -> None:
    z, weight = unit(11, 3, seed=0, dtype=dtype), unit(5, 3, seed=1, dtype=dtype)
    expected = naive_sinkhorn((z @ weight.T).numpy(), temperature, iterations)
    got = assigned(z, weight, temperature, iterations)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.numpy(), expected, rtol=tolerance, atol=1e-7 if dtype == torch.float32 else 1e-15)


@pytest.mark.usefixtures("memory")
def test_sinkhorn_balances_prototypes_and_normalises_samples() -> None:
    z = F.normalize(unit(64, 8, seed=1) + torch.arange(8) / 8, dim=1)  # one side of the sphere
    q = assigned(z, torch.eye(8), 0.5, iterations=50)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(q.sum(dim=0), torch.full((8,), 8.0), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("memory")
def test_sinkhorn_survives_a_tiny_temperature_and_no_rows() -> None:
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])
    assert torch.isfinite(assigned(z, torch.eye(2), 0.005)).all()
    assert assigned(torch.empty(0, 4), unit(3, 4, seed=0), 0.1).shape == (0, 3)


def test_sinkhorn_computes_in_float32_under_autocast() -> None:
    z, weight = unit(6, 4, seed=2).bfloat16(), unit(5, 4, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        bias = sinkhorn(z, weight, 0.1)
    assert bias.dtype == torch.float32
    torch.testing.assert_close(bias, sinkhorn(z.float(), weight, 0.1))


def test_centre_equals_the_equation_over_three_steps() -> None:
    centre, c, weight = Centre(4, momentum=0.8), np.zeros(4), unit(4, 3, seed=9)
    for seed in range(3):
        z = unit(6, 3, seed=seed)
        x = (z @ weight.T).double().numpy()
        e = np.exp((x - c) / 0.07)
        got = Targets(z[None], weight, 0.07, centre(z, weight, 0.07)[None]).dense()[0]
        np.testing.assert_allclose(got.numpy(), e / e.sum(1, keepdims=True), rtol=1e-4, atol=1e-7)
        c = 0.8 * c + 0.2 * x.mean(0)
        np.testing.assert_allclose(centre.value.numpy(), c, rtol=1e-5)


def test_centre_stays_when_there_is_no_row() -> None:
    centre = Centre(3)
    centre.value.fill_(2.0)
    assert torch.isfinite(centre(torch.empty(0, 5), unit(3, 5, seed=0), 0.1)).all()
    assert centre.value.tolist() == [2.0, 2.0, 2.0]


def test_rows_that_do_not_count_change_nothing() -> None:
    z, weight, others = (unit(n, 6, seed=n, dtype=torch.float64) for n in (12, 7, 5))
    both, counted = torch.cat([others, z]), torch.arange(17) >= 5
    torch.testing.assert_close(sinkhorn(both, weight, 0.1, counted=counted), sinkhorn(z, weight, 0.1))
    assert (sinkhorn(both, weight, 0.1) - sinkhorn(z, weight, 0.1)).abs().max() > 0.01
