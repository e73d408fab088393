"""The page on scale is what the program calculates today, and its arithmetic behaves."""

from __future__ import annotations

import pytest

from benchmarks import scale


def test_the_page_is_not_stale() -> None:
    assert scale.PAGE.read_text(encoding="utf-8") == scale.page(), "run python -m benchmarks.scale"


def test_more_gpus_are_faster_and_less_than_proportionally() -> None:
    for name in scale.MODELS:
        one, two, three = [plan for plan in scale.plans() if plan.name == name]
        speeds = [plan.gpus * plan.mine / plan.step for plan in (one, two, three)]
        assert speeds[0] < speeds[1] < speeds[2]
        assert speeds[1] / speeds[0] <= 8
        assert speeds[2] / speeds[1] <= 8


def test_work_and_parameters_are_the_published_ones() -> None:
    large = next(plan for plan in scale.plans() if plan.name == "ViT-L/16")
    assert large.work == pytest.approx(1522e9, rel=0.15)  # DINOv2's ViT-L, FACTS of the field
    assert large.parameters > 304e6


def test_a_plan_that_nothing_holds_up_is_short_of_nothing() -> None:
    plan = scale.Plan("easy", 8, 1e6, 1e12, 1e9)
    assert max(plan.needs(crops=1e4, size=1e3).values()) < 1
    assert plan.needs(crops=1.0, size=1e3)["cores for crops"] > 1
