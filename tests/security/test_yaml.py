"""YAML and key=value words that mean harm: an error in no time, which names the file or the key.

Deep nesting takes a second, until Python's limit of recursion ends it: the timeouts are for what would take for ever.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune import studies
from hybridssl import plain_yaml
from hybridssl.errors import UserError
from pretrain.command import load
from pretrain.recipe import RECIPES

BOMB = "a: &a [lol, lol, lol]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HARMFUL = {
    "aliases that stand for a billion values": BOMB + "name: *i\n",
    "a list within itself": "name: &a [*a]\n",
    "a mapping within itself": "backbone: &a {args: *a}\n",
    "a merge of itself": "backbone: &a\n  <<: *a\n",
    "deep lists": "name: " + "[" * 20_000,
    "deep mappings": "name: " + "{a: " * 20_000,
    "a number with too many digits": "steps: " + "9" * 10_000,
    "a day that is none": "name: 2026-13-45",
    "a key twice": "steps: 1\nsteps: 2",
    "a key of a section twice": "optim: {lr: 1.0, lr: 2.0}",
    "an object": "name: !!python/object/apply:os.getcwd []",
    "a name of Python": "name: !!python/name:os.system",
    "a key that is a list": "? [a, b]\n: 1",
    "no UTF-8": "name: \udcff",
    "a control character": "name: \x00",
    "an end too early": "name: 'abc",
    "two documents": "steps: 1\n---\nsteps: 2",
    "no mapping": "- steps",
    "infinity for steps": "steps: .inf",
    "nothing for a number": "optim: {lr: .nan}",
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", HARMFUL)
def test_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "evil.yaml"
    path.write_bytes(HARMFUL[name].encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"evil\.yaml|steps|optim") as caught:
        load([f"recipe={path}", "data.train=d", "out=o"])
    assert len(str(caught.value)) < 1_000
    with pytest.raises(UserError, match=r"evil\.yaml") as caught:
        studies.read(str(path))
    assert len(str(caught.value)) < 1_000


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "word",
    [
        "backbone.args=" + "[" * 20_000,
        "backbone.args=&a [*a]",
        "steps=" + "9" * 10_000,
        "name=2026-13-45",
        "steps=!!python/object/apply:os.getcwd []",
        "steps=\x00",
        "steps={a: 1, a: 2}",
        "steps.a.b=1",
        ".=1",
        "steps..=1",
        "data.train=",
        "data.train={a: 1}",
        "=1",
        "steps",
        "recipe=\x00.yaml",
        "recipe=../../../etc/passwd",
        "recipe=/etc/passwd",
        "recipe=.yaml",
        "objectives=[dino]",
        "objectives.dino=[1]",
        "objectives.__class__={}",
    ],
    ids=lambda word: word[:30].replace("\x00", "NUL"),
)
def test_words(word: str) -> None:
    with pytest.raises(UserError) as caught:
        load(["recipe=demo", "data.train=d", "out=o", word])
    assert len(str(caught.value)) < 1_000


def test_what_people_write_is_read_as_before() -> None:
    assert issubclass(plain_yaml._Plain, yaml.SafeLoader)
    for path in [*RECIPES.glob("*.yaml"), *studies.STUDIES.glob("*.yaml")]:
        text = path.read_text(encoding="utf-8")
        assert plain_yaml.parse(text) == yaml.safe_load(text)


STUDY = """
title: T
asks: Q?
arguments: {data: {help: d}, backbones: {help: b, many: true}}
steps: [{title: Probe, run: "finetune probe --data {data} --out {out}"}]
limits: []
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("title: Probe", "title: [Probe]"),
        ("finetune probe", "sh -c"),
        ("finetune probe", "''"),
        ('"finetune probe', "\"finetune probe 'open"),
        ("title: Probe", "title: Probe, with: {../../x: 1}"),
        ("title: Probe", "title: Probe, with: {/tmp/x: 1}"),
        ("title: Probe", "title: Probe, for: nothing"),
        ("title: Probe", "title: Probe, exec: x"),
        ("{data} ", "{data.__class__.__mro__} "),
        ("{data} ", "{0} "),
        ("{data} ", "{} "),
        ("arguments: {data: {help: d}", "arguments: {data: d"),
        ("limits: []", "limits: 3"),
        ("steps: [{", "steps: {a: {"),
        ("asks: Q?", "asks: {a: 1}"),
    ],
)
def test_studies(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(STUDY)
    study = studies.read(str(path))
    values = studies.fill(study, ["data=d", "backbones=a"])
    assert studies.plan(study, values, tmp_path)
    assert old in STUDY
    path.write_text(STUDY.replace(old, new))
    with pytest.raises(UserError, match="mine"):
        studies.plan(studies.read(str(path)), values, tmp_path)
