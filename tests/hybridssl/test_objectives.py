"""Objectives are found by their file. What each of them owes the loop is in test_running.py and test_dist.py."""

from __future__ import annotations

import pytest

from hybridssl.errors import UserError
from hybridssl.objectives import Objective, build, options_types
from tests.hybridssl import arms


def test_objectives_are_found_by_their_file() -> None:
    made = {name: arms.build(arms.arms()[name]) for name in options_types()}
    assert {"dino", "ibot", "spread", "labels"} <= made.keys()
    for name, objective in made.items():
        assert isinstance(objective, Objective)
        assert type(objective).__module__ == f"hybridssl.objectives.{name}"
        assert objective.expects.endswith(".")
        assert objective.views <= {"global", "local", "clean"}


def test_weight_zero_leaves_an_objective_out_and_a_wrong_name_is_named(toys) -> None:
    types = options_types()
    assert list(build({"dino": types["dino"](weight=0.0), "spread": types["spread"]()}, toys.context())) == ["spread"]
    with pytest.raises(UserError, match="did you mean spread"):
        build({"sprea": types["spread"]()}, toys.context())


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("name", ["dino", "ibot", "swav"])
def test_the_last_layer_rests_at_the_start(name: str, start: float, toys) -> None:
    """Of its own objective: a late head is as new as one of the first step."""
    student, _ = toys.pair({name: arms.small(name, freeze_last=0.1, start=start), "spread": arms.small("spread")})
    objective = student[name]
    assert [id(p) for p in objective.frozen(start + 0.05)] == [id(objective.head.prototypes)]
    assert list(objective.frozen(start + 0.1)) == []
    never, _ = toys.pair({name: arms.small(name)})
    assert list(never[name].frozen(0.0)) == []


@pytest.mark.parametrize("name", sorted(options_types()))
def test_a_weight_that_would_never_be_reached_is_refused(name: str) -> None:
    options = options_types()[name]
    assert options(start=0.7, ramp=0.3).ramp == 0.3
    with pytest.raises(ValueError, match=r"ramp=0\.4 from start=0\.7 on would not end within the run: say ramp=0\.3 "):
        options(start=0.7, ramp=0.4)
