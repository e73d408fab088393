"""Every recipe starts, with a tiny network of its kind in place of the real one and local weights in place of a hub's.

A new recipe in pretrain/recipes is covered without a change here.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizer

from hybridssl import backbone
from hybridssl.backbone import BackboneOptions
from hybridssl.recipe import read_yaml, resolve, to_dict
from pretrain import command
from pretrain import recipe as recipes
from pretrain.loop import main
from pretrain.recipe import Recipe
from tests.pretrain.conftest import lines

STEPS = 4  # so that what starts at .7 has begun
TRANSFORMER = {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
CONVOLUTIONS = {
    "densenet": {"growth_rate": 4, "block_config": [1, 1, 1, 1]},
    "resnet": {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]},
    "convnext": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]},
}
SMALL = {"prototypes": 16, "hidden": 32, "bottleneck": 8, "group": 4, "width": 32, "depth": 1}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "an", "image", "of", "lesion", "plaque", "nodule"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT, saved as a folder."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(WORDS), **size)).save_pretrained(folder)
    return folder


def tiny_backbone(name: str) -> dict[str, Any]:
    return next((args for kind, args in CONVOLUTIONS.items() if name.startswith(kind)), TRANSFORMER)


def shrunk(name: str, bert: Path, tmp_path: Path) -> list[str]:
    """The overrides that make a recipe small, and give it what it would fetch."""
    whole = resolve(Recipe, [read_yaml(recipes.find(name))])
    args = tiny_backbone(whole.backbone.name)
    size = 32 if args is TRANSFORMER else 64
    local = f"views.local_count={min(whole.views.local_count, 2)}"
    tree = [f"steps={STEPS}", "threads=1", "data.workers=0", "batch={size: 8, micro: 0}", "probe.every=0", local]
    tree += ["precision=no"]  # accelerate keeps what a process began with
    tree += [f"views.global_size={size}", f"views.local_size={size // 2}", "log.every=1", f"backbone.args={args}"]
    for objective, options in whole.objectives.items():
        fields = {field.name for field in dataclasses.fields(options)}
        tree += [f"objectives.{objective}.{key}={value}" for key, value in SMALL.items() if key in fields]
        if "encoder" in fields:
            tree.append(f"objectives.{objective}.encoder={bert}")
    if whole.text.encoder:
        tree.append(f"text.encoder={bert}")
    if whole.backbone.weights:
        plain = {**to_dict(whole.backbone), "weights": "", "lora": 0, "args": {**whole.backbone.args, **args}}
        torch.manual_seed(0)
        model = backbone.build(resolve(BackboneOptions, [plain]), 3, size).model
        save_file(model.state_dict(), tmp_path / "tiny.safetensors")
        tree.append(f"backbone.weights={tmp_path / 'tiny.safetensors'}")
    return tree


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_starts(name: str, index: Path, bert: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pretrain.report.write", lambda run, *_: run / "report.html")  # takes longer than the steps
    out = tmp_path / "run"
    assert main([f"recipe={name}", f"data.train={index}", f"out={out}", *shrunk(name, bert, tmp_path)]) == 0
    told = lines(out)
    assert [line["step"] for line in told] == list(range(1, STEPS + 1))
    expected = {n: o for n, o in resolve(Recipe, [read_yaml(recipes.find(name))]).objectives.items() if o.weight}
    for line in told:
        found = {key.split("/")[1]: value for key, value in line.items() if key.startswith("loss/")}
        assert found.keys() == {n for n, o in expected.items() if line["step"] - 1 >= o.start * STEPS}
        assert all(math.isfinite(value) for value in (*found.values(), line["grad_norm"]))
        assert line["skipped"] == 0


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_says_what_it_needs_and_what_to_expect(name: str) -> None:
    text = recipes.find(name).read_text(encoding="utf-8")
    head = text[: text.index("\nsteps:")]
    for word in ("data", "hardware", "duration", "result", "command"):
        assert f"\n# {word}" in head, word
    assert f"recipe={name} " in head


def test_precision_no_is_a_word_and_not_yamls_false() -> None:
    given = ["recipe=demo", "data.train=d", "out=o", "precision=no"]
    assert command.load(given).precision == "no"
