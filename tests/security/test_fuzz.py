"""Spoilt files and words at every reader: an error of ours or a value, and never anything else, nor for long."""

from __future__ import annotations

import pytest

from tests.security.fuzzing import TARGETS, Target, attempt


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", TARGETS)
def test_few(name: str) -> None:
    assert attempt(name, 40).total() >= 40


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("name", TARGETS)
def test_many(name: str) -> None:
    assert attempt(name, 3_000).total() >= 3_000


def test_a_fault_is_not_counted_as_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(value: bytes) -> str:
        return {}[len(value)]  # a KeyError, as a careless reader raises it

    monkeypatch.setitem(TARGETS, "careless", Target(TARGETS["study"].inputs, faulty))
    with pytest.raises(KeyError):
        attempt("careless", 5)
