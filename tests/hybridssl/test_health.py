from __future__ import annotations

import math

import pytest
import torch

from hybridssl import health


def test_entropies_of_known_distributions() -> None:
    sharp = torch.eye(4)
    assert health.target_entropy(sharp).item() == 0
    assert health.marginal_entropy(sharp).item() == pytest.approx(math.log(4))
    flat = torch.full((3, 4), 0.25)
    assert health.target_entropy(flat).item() == pytest.approx(math.log(4))
    assert health.max_entropy(flat).item() == pytest.approx(math.log(4))
    assert health.marginal_entropy(sharp[[0, 0, 0]]).item() == 0
    mixed = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    by_hand = (-0.9 * math.log(0.9) - 0.1 * math.log(0.1) + math.log(2)) / 2
    assert health.target_entropy(mixed).item() == pytest.approx(by_hand)


def test_agreement_counts_equal_argmax() -> None:
    student = torch.tensor([[3.0, 1.0], [0.0, 9.0], [2.0, 1.0], [0.0, 1.0]])
    teacher = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    assert health.agreement(student, teacher).item() == 0.75


def test_prototype_usage_does_not_report_the_batch_size() -> None:
    assert health.prototype_usage(torch.eye(50)[:10]).item() == 1  # ten samples on ten of fifty
    assert health.prototype_usage(torch.eye(50)[[3] * 10]).item() == pytest.approx(0.1)  # collapse
    assert health.prototype_usage(torch.eye(4)[[0, 1, 0, 1, 0, 1]]).item() == 0.5  # two of four, six samples


def test_rankme_of_known_spectra() -> None:
    basis = torch.linalg.qr(torch.randn(32, 8, generator=torch.Generator().manual_seed(0))).Q
    assert health.rankme(basis).item() == pytest.approx(8, rel=1e-3)
    assert health.rankme(basis * torch.tensor([1.0] * 4 + [0.0] * 4)).item() == pytest.approx(4, rel=1e-3)
    assert health.rankme(torch.ones(16, 8)).item() == pytest.approx(1, rel=1e-3)
    sigma = torch.tensor([3.0, 1.0])
    share = [0.75, 0.25]
    assert health.rankme(torch.diag(sigma)).item() == pytest.approx(
        math.exp(-sum(p * math.log(p) for p in share)), rel=1e-4
    )
    assert torch.isfinite(health.rankme(torch.zeros(4, 4)))


def test_rankme_of_nothing_and_of_what_is_not_finite_is_not_a_number() -> None:
    assert health.rankme(torch.zeros(0, 4)).isnan()
    for value in (math.nan, math.inf):
        assert health.rankme(torch.tensor([[1.0, 0.0], [value, 1.0]])).isnan()
