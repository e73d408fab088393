"""`python -m pretrain --help KEY`."""

from __future__ import annotations

import re

import pytest

from pretrain import keys
from pretrain.loop import main


def test_help_tells_a_key_a_section_and_all(capsys) -> None:
    assert main(["--help", "optim.lr", "views"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^  optim\.lr=0\.001   number\n      for a batch of 1,024 images", told, re.M)
    assert told.count("  views.") == sum(path.startswith("views.") for path in keys.all_keys())
    assert "optim.wd" not in told
    assert main(["--help", "keys"]) == 0
    told = capsys.readouterr().out
    assert {line.split("=")[0].strip() for line in told.splitlines() if re.match(r"  \w\S*=", line)} == {
        *keys.all_keys()
    }
    assert max(map(len, told.splitlines())) <= 120


def test_help_of_a_section_has_the_sections_inside_it() -> None:
    told = keys.told("objectives.labels")
    assert "objectives.labels.start=" in told
    assert "objectives.dino" not in told
    assert "objectives.dino.prototypes=" in keys.told("objectives")


def test_a_key_that_there_is_not_is_an_error_that_names_the_nearest(capsys) -> None:
    assert main(["--help", "optm.lr"]) == 2
    assert "there is no recipe key optm.lr; did you mean optim.lr?" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["recipe=demo", "--help"], []])
def test_help_without_a_key_is_the_usage(arguments: list[str], capsys) -> None:
    assert main(arguments) == 0
    assert "usage: accelerate launch pretrain" in capsys.readouterr().out
