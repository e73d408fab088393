"""A pickle in every place that something is read from: none is opened, and each is named in an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from finetune import backbones, features, foreign, results, studies
from hybridssl import backbone, run, text
from hybridssl.backbone import BackboneOptions
from hybridssl.encoder import load_encoder
from hybridssl.errors import UserError
from hybridssl.export import export
from pretrain import command
from shards import scan
from shards.errors import DataError
from shards.format import decode, decode_mask
from shards.index import Index
from shards.options import BuildOptions
from shards.pack import pack
from shards.table import Row
from tests.security.conftest import Sign, picture, tar

TINY = {"name": "vit_tiny_patch16_224", "args": {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": 8}}


def options(**more: object) -> BackboneOptions:
    return BackboneOptions(**{**TINY, "image_size": 32, **more})  # type: ignore[arg-type]


def weights(state: dict[str, torch.Tensor], folder: Path, sign: Sign) -> None:
    """A folder whose safetensors are missing, and the pickles that libraries would go on to."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name in ("pytorch_model.bin", "pytorch_model.pth", "model.pth", "model.pt"):
        (folder / name).write_bytes(sign.checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "state.json"])
@pytest.mark.parametrize("digest", ["recorded", "adapted"])
def test_checkpoint(run_folder: Path, tmp_path: Path, sign: Sign, name: str, digest: str) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    checkpoint = run.latest(tmp_path / "run")
    (checkpoint / name).write_bytes(sign.checkpoint)
    if digest == "adapted" and name != "state.json":  # as somebody would who wants it to be read
        state = json.loads((checkpoint / "state.json").read_text())
        state["sha256"][name] = run.sha256(checkpoint / name)
        (checkpoint / "state.json").write_text(json.dumps(state))
    what = name if name != "optim.safetensors" else "model.safetensors"
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        run.read_tensors(checkpoint, name if name != "state.json" else what)
    if name != "optim.safetensors":
        for read in (run.load_backbone, lambda p: export(p, tmp_path / "out"), lambda p: backbones.load(str(p))):
            with pytest.raises(UserError, match=name.replace(".", r"\.")):
                read(checkpoint)


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth", "pt", "mask.pkl", "PKL"])
def test_a_pickled_member_of_a_shard(tmp_path: Path, sign: Sign, extension: str) -> None:
    tar(tmp_path / "x.tar", {"a.png": picture(), f"a.{extension}": sign.pickle})
    with pytest.raises(DataError, match=rf"x\.tar: member 'a\.{extension}' is pickled"):
        scan.write(tmp_path)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tif", "mask.png", "npy", "npz", "cls", "txt"])
def test_a_pickle_under_another_name_in_a_shard(tmp_path: Path, sign: Sign, extension: str) -> None:
    data = sign.numpy if extension.startswith("np") else sign.pickle
    members = {"a.jpg" if extension == "jpg" else "a.png": picture(), f"a.{extension}": data}
    tar(tmp_path / "x.tar", members)
    index = scan.write(tmp_path)
    if extension == "txt":
        with pytest.raises(DataError, match="sample a: its txt member"):
            index.read(0)
        return
    sample = index.read(0)
    if extension in ("png", "jpg"):
        with pytest.raises(DataError, match="not a JPEG, PNG, WebP or TIFF"):
            decode(sample.image)
    if extension == "mask.png":
        with pytest.raises(DataError, match=r"damaged|not a JPEG"):
            decode_mask(sample.mask or b"")


def test_a_pickle_for_a_row_of_a_shard(tmp_path: Path, sign: Sign) -> None:
    tar(tmp_path / "x.tar", {"a.png": picture(), "a.json": sign.pickle})
    with pytest.raises(DataError, match=r"x\.tar: the json member of sample 'a'"):
        scan.write(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "dcm", "npy", "pkl"])
def test_a_pickle_for_an_image_of_a_build(tmp_path: Path, sign: Sign, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(sign.numpy if suffix == "npy" else sign.pickle)
    result = pack(Row(path, path.name), BuildOptions(salt="a salt that is long enough"))
    assert not result.samples
    assert [entry["path"] for entry in result.bad] == [path.name]


@pytest.mark.parametrize("name", ["index.json", "index.safetensors"])
def test_index(index: Index, tmp_path: Path, sign: Sign, name: str) -> None:
    shutil.copytree(index.root, tmp_path / "set")
    (tmp_path / "set" / name).write_bytes(sign.pickle)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        Index.open(tmp_path / "set")


def test_exported_folder(export_folder: Path, tmp_path: Path, sign: Sign) -> None:
    folder = tmp_path / "model"
    shutil.copytree(export_folder, folder)
    for name in ("pytorch_model.bin", "model.pth", "pytorch_model.pth"):
        (folder / name).write_bytes(sign.checkpoint)
    expected = backbones.load(str(export_folder)).sha256
    assert backbones.load(str(folder)).sha256 == expected  # beside the weights they are not looked at
    assert foreign.from_transformers(f"hf:{folder}", False, "cpu", None).dim == 24
    for data in (sign.checkpoint, sign.pickle):
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(UserError, match=r"cannot load .*model"):
            backbones.load(str(folder))
    (folder / "model.safetensors").unlink()
    for spec in (str(folder), f"hf:{folder}"):
        with pytest.raises(UserError, match=r"model\.safetensors"):
            backbones.load(spec)
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle|model\.pth is a pickle"):
        backbone.load_weights(backbone.build(options()), options(weights=str(folder)))


@pytest.mark.parametrize("name", ["config.json", "pretraining.safetensors"])
def test_what_lies_beside_exported_weights(export_folder: Path, tmp_path: Path, sign: Sign, name: str) -> None:
    shutil.copytree(export_folder, tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(sign.pickle)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        backbones.load(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "more",
    [
        {"model_args": {"checkpoint_path": "evil.pth"}},
        {"model_args": {"pretrained_cfg": {"file": "evil.pth"}}},
        {"model_args": {"pretrained_custom_load": True}},
        {"model_args": "evil"},
        {"architecture": "hf-hub:evil/model"},
        {"architecture": "local-dir:evil"},
        {"architecture": "../../evil"},
        {"architecture": ["vit_tiny_patch16_224"]},
    ],
)
@pytest.mark.parametrize("spec", ["{}", "random:{}", "hf:{}", "random:hf:{}"])
def test_a_config_that_names_other_weights(
    export_folder: Path, tmp_path: Path, sign: Sign, monkeypatch: pytest.MonkeyPatch, more: dict, spec: str
) -> None:
    shutil.copytree(export_folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(sign.checkpoint)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **more}))
    with pytest.raises(UserError, match=r"model/config\.json"):
        backbones.load(spec.format(tmp_path / "model"))


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg", "pretrained", "cache_dir"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_a_recipe_takes_weights_by_one_key_alone(tmp_path: Path, sign: Sign, key: str, name: str) -> None:
    (tmp_path / "evil.pth").write_bytes(sign.checkpoint)
    with pytest.raises(UserError, match=rf"backbone\.args names {key}"):
        backbone.build(BackboneOptions(name, args={key: str(tmp_path / "evil.pth")}))


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.pkl", "w.npz", "w.safetensors"])
def test_foreign_weights(tmp_path: Path, sign: Sign, name: str) -> None:
    """Not opened; and with the flag for files of others, by an unpickler that calls nothing."""
    path = tmp_path / name
    path.write_bytes(sign.checkpoint)
    for pickled in (False, True):
        with pytest.raises(UserError, match=rf"backbone\.weights={path}"):
            backbone.load_weights(backbone.build(options()), options(weights=str(path), pickled=pickled))


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda state: {
            "teacher": {f"backbone.{k}": v for k, v in state.items()} | {"head.x": torch.ones(1)},
            "step": 3,
        },
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    ],
    ids=["plain", "dinov2", "wrapped"],
)
def test_foreign_weights_by_the_flag_alone(tmp_path: Path, wrap: Callable[[dict], dict]) -> None:
    path, given = tmp_path / "w.pth", backbone.build(options()).model.state_dict()
    torch.save(wrap(given), path)
    with pytest.raises(UserError, match=r"backbone\.pickled=true"):
        backbone.load_weights(backbone.build(options()), options(weights=str(path)))
    mine = backbone.build(options())
    assert backbone.load_weights(mine, options(weights=str(path), pickled=True)).matched == len(given)
    assert all(torch.equal(mine.model.state_dict()[name], tensor) for name, tensor in given.items())


@pytest.mark.parametrize("source", ["org/model", "pretrained", "timm"])
def test_weights_of_a_hub_without_safetensors(
    tmp_path: Path, sign: Sign, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """timm asks for safetensors, is told that there are none, and would go on to the pickle."""
    from huggingface_hub.errors import EntryNotFoundError
    from timm.models import _hub

    (tmp_path / "pytorch_model.bin").write_bytes(sign.checkpoint)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "pretrained_cfg": {}, "model_args": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked: list[str] = []

    def download(repo_id: str, filename: str, **_: object) -> str:
        asked.append(filename)
        if not (tmp_path / filename).is_file():
            raise EntryNotFoundError(f"no {filename} in {repo_id}")
        return str(tmp_path / filename)

    monkeypatch.setattr(_hub, "hf_hub_download", download)
    monkeypatch.setattr(foreign.hub, "require", lambda what: None)

    def load() -> object:
        if source == "timm":
            return backbones.load("timm:vit_tiny_patch16_224.augreg_in21k")
        return backbone.load_weights(backbone.build(options(args={})), options(args={}, weights=source))

    with pytest.raises(UserError, match=r"model\.safetensors"):
        load()
    assert "pytorch_model.bin" not in asked
    assert "model.safetensors" in asked


def test_prototypes(tmp_path: Path, sign: Sign) -> None:
    path = tmp_path / "prototypes.safetensors"
    path.write_bytes(sign.checkpoint)
    for read in (
        lambda: text.load_cache(path),
        lambda: text.class_embeddings(text.TextOptions(cache=str(path)), ["a"]),
    ):
        with pytest.raises(UserError, match=r"prototypes\.safetensors cannot be read"):
            read()


def test_prototypes_of_a_run(run_folder: Path, tmp_path: Path, sign: Sign) -> None:
    from finetune.words import _start
    from pretrain.report_images import _unit

    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "prototypes.safetensors").write_bytes(sign.checkpoint)
    with pytest.raises(UserError, match=r"prototypes\.safetensors cannot be read"):
        _start(tmp_path / "run", ["a"])
    assert _unit(tmp_path / "run" / "prototypes.safetensors", "initial") is None  # the report goes without


def test_cached_features_are_computed_again(index: Index, tmp_path: Path, sign: Sign) -> None:
    encoder = backbones.load("histogram")
    numbers = np.arange(4)
    found = features.extract(encoder, index, numbers, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    for data in (sign.checkpoint, sign.pickle, sign.numpy):
        file.write_bytes(data)
        again = features.extract(encoder, index, numbers, cache=tmp_path / "cache")
        assert np.array_equal(again.x["cls"], found.x["cls"])


def test_results(tmp_path: Path, sign: Sign) -> None:
    (tmp_path / "results.json").write_bytes(sign.pickle)
    with pytest.raises(UserError, match=r"results\.json cannot be read"):
        results.find([tmp_path])
    (tmp_path / "predictions.safetensors").write_bytes(sign.checkpoint)
    with pytest.raises(UserError, match=r"predictions\.safetensors cannot be read"):
        results.Result(tmp_path / "results.json", {}).predictions()


def text_folder(folder: Path) -> Path:
    """A BERT without its weights."""
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "nevus"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **size)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json", "adapter"])
def test_text_encoder(tmp_path: Path, sign: Sign, name: str) -> None:
    folder = text_folder(tmp_path / "bert")
    if name == "adapter":  # transformers looks for one by itself
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 1, "target_modules": ["key"]})
        )
        (folder / "adapter_model.bin").write_bytes(sign.checkpoint)
    elif name.endswith("bin"):
        weights({}, folder, sign)
    else:
        (folder / name).write_bytes(sign.checkpoint)
    with pytest.raises(UserError, match=r"text encoder .*bert"):
        load_encoder(str(folder))


def test_weights_of_transformers(tmp_path: Path, sign: Sign) -> None:
    import transformers as hf

    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    hf.Dinov2Model(hf.Dinov2Config(**size)).save_pretrained(tmp_path / "m")
    hf.BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "m"
    )
    assert backbones.load(f"hf:{tmp_path / 'm'}").dim == 24
    weights({}, tmp_path / "m", sign)
    with pytest.raises(UserError, match=r"cannot load hf:.*/m"):
        backbones.load(f"hf:{tmp_path / 'm'}")


@pytest.mark.parametrize("body", ["{}", "steps: {}", "steps: [{}]", "? {}\n: 1"])
def test_yaml_makes_no_objects(tmp_path: Path, sign: Sign, body: str) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(body.replace("{}", sign.yaml.strip()) + "\n")
    with pytest.raises(UserError, match=r"evil\.yaml"):
        command.load([f"recipe={path}", "data.train=d", "out=o"])
    with pytest.raises(UserError, match=r"evil\.yaml"):
        studies.read(str(path))
    with pytest.raises(UserError, match="steps"):
        command.load([f"steps={sign.yaml.strip()}", "recipe=demo", "data.train=d", "out=o"])
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(sign.yaml)


def test_the_bombs_go_off(tmp_path: Path) -> None:
    """What the tests above rely on: whoever does open these has the sign shown."""
    import io
    import pickle

    def shows(use: Callable[[Sign], object], name: str) -> bool:
        (tmp_path / name).mkdir()
        sign = Sign(tmp_path / name)
        use(sign)
        return sign.shown()

    assert shows(lambda s: pickle.loads(s.pickle), "a")
    assert shows(lambda s: torch.load(io.BytesIO(s.checkpoint), weights_only=False), "b")
    assert shows(lambda s: np.load(io.BytesIO(s.numpy), allow_pickle=True), "c")
    assert shows(lambda s: yaml.unsafe_load(s.yaml), "d")
    assert shows(lambda s: exec(s.python), "e")


def test_safetensors_beside_a_pickle_are_what_is_read(tmp_path: Path, sign: Sign) -> None:
    model = backbone.build(options())
    save_file(model.model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(sign.checkpoint)
    coverage = backbone.load_weights(backbone.build(options()), options(weights=str(tmp_path)))
    assert coverage.matched == coverage.total
