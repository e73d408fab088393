"""Spoilt files and words at every reader: an error of ours or a value, and never anything else, nor for long."""

from __future__ import annotations

import pytest

from tests.security.fuzzing import TARGETS, attempt


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", TARGETS)
def test_few(name: str) -> None:
    assert attempt(name, 40).total() >= 40


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("name", TARGETS)
def test_many(name: str) -> None:
    found = attempt(name, 3_000)
    assert found["refused"] > 0
