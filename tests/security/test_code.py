"""A model of others that brings code along: it is not run, and nobody is asked whether it should be."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import pytest

from finetune import backbones, promptable
from finetune.words import of_two_towers
from hybridssl import text
from hybridssl.encoder import embed_sentences, load_encoder
from hybridssl.errors import UserError
from tests.security.conftest import Sign
from tests.security.test_pickle import text_folder

AUTO = {
    name: f"evil.{kind}"
    for name, kind in [
        ("AutoConfig", "Evil"),
        ("AutoModel", "Evil"),
        ("AutoTokenizer", "Evil"),
        ("AutoImageProcessor", "Evil"),
        ("AutoProcessor", "Evil"),
    ]
}


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("the terminal was asked whether to run the code")

    monkeypatch.setattr(builtins, "input", asked)


def infect(folder: Path, sign: Sign, *names: str, model_type: str | None = None) -> Path:
    """Name a class of a Python file of the folder wherever transformers looks for one."""
    (folder / "evil.py").write_text(sign.python)
    for name in names:
        path = folder / name
        about = json.loads(path.read_text()) if path.is_file() else {}
        about["auto_map"] = AUTO | ({"AutoTokenizer": ["evil.Evil", "evil.Evil"]} if "token" in name else {})
        if model_type is not None and name == "config.json":
            about["model_type"] = model_type
        path.write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("model_type", [None, "a-new-kind"])
def test_text_encoder(tmp_path: Path, sign: Sign, model_type: str | None) -> None:
    folder = infect(text_folder(tmp_path / "bert"), sign, "config.json", "tokenizer_config.json", model_type=model_type)
    if model_type is None:  # a kind that transformers has itself: its own classes are taken
        assert embed_sentences(str(folder), ["nevus"]).shape == (1, 16)
    else:
        with pytest.raises(UserError, match=r"text encoder .*bert"):
            load_encoder(str(folder))
    assert not sign.shown()


@pytest.mark.parametrize("model_type", [None, "a-new-kind"])
@pytest.mark.parametrize("spec", ["hf:{}", "random:hf:{}"])
def test_image_model(tmp_path: Path, sign: Sign, spec: str, model_type: str | None) -> None:
    import transformers as hf

    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    folder = tmp_path / "m"
    hf.Dinov2Model(hf.Dinov2Config(**size)).save_pretrained(folder)
    hf.BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    infect(folder, sign, "config.json", "preprocessor_config.json", "processor_config.json", model_type=model_type)
    if model_type is None:
        assert backbones.load(spec.format(folder)).dim == 24
    else:
        with pytest.raises(UserError, match="cannot load"):
            backbones.load(spec.format(folder))
        with pytest.raises(UserError, match="cannot load"):
            of_two_towers(f"hf:{folder}", [text.ClassText("a", "a")], 24)
        with pytest.raises(UserError, match="cannot load"):
            promptable.load_promptable(str(folder))
    assert not sign.shown()


@pytest.mark.parametrize("spec", ["{}", "hf:{}", "random:{}"])
def test_exported_folder(export_folder: Path, tmp_path: Path, sign: Sign, spec: str) -> None:
    shutil.copytree(export_folder, tmp_path / "model")
    folder = infect(tmp_path / "model", sign, "config.json")
    assert backbones.load(spec.format(folder)).dim == 24
    assert not sign.shown()


@pytest.mark.parametrize(
    "asked",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel@main:function"},
        {"attn_implementation": {"": "evil/kernel"}},
        {"attn_implementation": "paged|evil/kernel"},
        {"text_config": {"attn_implementation": "evil/kernel"}},
        {"experts_implementation": "evil/kernel"},
    ],
)
def test_a_kernel_of_a_repository_is_not_fetched(tmp_path: Path, asked: dict) -> None:
    """transformers would: a config may name one, and it is compiled code."""
    folder = text_folder(tmp_path / "bert")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "attn_implementation": "sdpa"}))
    assert embed_sentences(str(folder), ["nevus"]).shape == (1, 16)
    (folder / "config.json").write_text(json.dumps({**about, **asked}))
    readers = {
        "encoder": load_encoder,
        "backbone": lambda p: backbones.load(f"hf:{p}"),
        "words": lambda p: of_two_towers(f"hf:{p}", [text.ClassText("a", "a")], 24),
        "promptable": promptable.load_promptable,
    }
    for read in readers.values():
        with pytest.raises(UserError, match=r"bert/config\.json asks for _?\w+_implementation="):
            read(str(folder))


@pytest.mark.parametrize("name", ["package:evil", "package:os.path", "package:../evil", "package:", "package:.evil"])
def test_a_package_that_is_none_of_installed_ones(
    tmp_path: Path, sign: Sign, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "evil.py").write_text(sign.python)
    monkeypatch.chdir(tmp_path)  # python -m puts this folder first in the path
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="text encoder 'package:"):
        load_encoder(name)
