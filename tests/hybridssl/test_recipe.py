from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hybridssl.errors import UserError
from hybridssl.recipe import differences, parse_overrides, read_yaml, resolve, to_dict, to_yaml


@dataclass(frozen=True)
class Part:
    weight: float = 1.0
    kind: str = "a"


@dataclass(frozen=True)
class Section:
    lr: float = 0.1
    sizes: tuple[int, ...] = (1, 2)
    args: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Root:
    steps: int = 10
    quick: bool = False
    optim: Section = field(default_factory=Section)
    parts: dict[str, Part] = field(default_factory=dict, metadata={"types": lambda: {"dino": Part, "labels": Part}})


def test_later_layers_win_key_by_key() -> None:
    layers = [
        {"steps": 5, "optim": {"lr": 1.0, "sizes": [3]}},
        parse_overrides(["optim.lr=1e-4", "optim.args.depth=2"]),
    ]
    assert resolve(Root, layers) == Root(steps=5, optim=Section(1e-4, (3,), {"depth": 2}))


def test_a_part_is_switched_on_by_its_name_and_off_by_null() -> None:
    on = {"parts": {"dino": {"weight": 2}, "labels": {}}}
    assert resolve(Root, [on]).parts == {"dino": Part(2.0), "labels": Part()}
    assert resolve(Root, [on, parse_overrides(["parts.dino=null"])]).parts == {"labels": Part()}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("stesp=3", ["unknown recipe key 'stesp'", "'steps'"]),
        ("optim.lrr=3", ["'optim.lrr'", "'optim.lr'"]),
        ("lr=3", ["'lr'", "'optim.lr'"]),
        ("parts.dion.weight=3", ["'parts.dion'", "'parts.dino'"]),
        ("parts.dino.wieght=3", ["'parts.dino.wieght'", "'parts.dino.weight'"]),
        ("steps=many", ["steps", "whole number", "'many'"]),
        ("steps=1.5", ["steps", "whole number"]),
        ("steps=true", ["steps", "whole number"]),
        ("quick=3", ["quick", "true or false"]),
        ("optim.sizes=3", ["optim.sizes", "tuple"]),
        ("optim=3", ["optim", "lr"]),
        ("parts=3", ["parts", "dino"]),
        ("steps", ["key=value"]),
        ("steps=[1", ["steps", "YAML"]),
    ],
)
def test_a_mistake_is_answered_with_the_key_and_the_nearest_right_one(argument: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve(Root, [parse_overrides([argument])])
    for word in words:
        assert word in str(caught.value)


def test_what_is_printed_reads_back_equal(tmp_path: Path) -> None:
    recipe = resolve(Root, [{"steps": 3, "optim": {"sizes": [4, 5]}, "parts": {"dino": {"kind": "b: c"}}}])
    (tmp_path / "r.yaml").write_text(to_yaml(recipe))
    assert resolve(Root, [read_yaml(tmp_path / "r.yaml")]) == recipe


def test_yaml_files_that_are_none_are_named(tmp_path: Path) -> None:
    for name, text in (("broken.yaml", "a: [1"), ("list.yaml", "- 1"), ("binary.yaml", "\udcff")):
        (tmp_path / name).write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match=name):
            read_yaml(tmp_path / name)
    with pytest.raises(UserError, match=r"gone\.yaml"):
        read_yaml(tmp_path / "gone.yaml")


def test_yaml_never_builds_objects(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("steps: !!python/object/apply:os.getcwd []")
    with pytest.raises(UserError, match=r"evil\.yaml"):
        read_yaml(tmp_path / "evil.yaml")


def test_differences_name_each_key_and_skip_what_may_change() -> None:
    old, new = to_dict(Root()), to_dict(Root(steps=11, optim=Section(lr=0.2), parts={"dino": Part()}))
    assert differences(old, new, ignore=("parts",)) == ["optim.lr: 0.1 -> 0.2", "steps: 10 -> 11"]
    assert any("parts.dino.weight" in line for line in differences(old, new))
    assert differences(old, new, ignore=("optim", "parts", "steps")) == []
