"""constraints.txt: its pins install on every Python that pyproject.toml promises, or say where they do not hold."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = {pin.name: pin for pin in (Requirement(line) for line in LINES if line and not line.startswith("#"))}


def holds(pin: Requirement, python: str) -> bool:
    """Whether pip heeds the pin on this Python, such as 3.10.0."""
    known = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    return pin.marker is None or pin.marker.evaluate(known)


def test_a_pin_holds_only_where_its_package_installs() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (oldest,) = re.findall(r'^requires-python = ">=([\d.]+)"$', text, re.M)
    asked = []
    for name, pin in PINS.items():
        try:
            needs = SpecifierSet(metadata(name).get("Requires-Python", ""))
        except PackageNotFoundError:  # an extra that is not here
            continue
        asked.append(name)
        for python in (f"{oldest}.0", "3.11.0"):
            wrong = holds(pin, python) and not needs.contains(python)
            assert not wrong, f"constraints.txt: {pin} needs Python {needs}; give it a marker such as python_version"
    assert len(asked) > 30


@pytest.mark.parametrize("python", ["3.10.0", "3.11.7", "3.12.1"])
def test_torch_and_torchvision_float_together_or_not_at_all(python: str) -> None:
    assert holds(PINS["torch"], python) == holds(PINS["torchvision"], python)
