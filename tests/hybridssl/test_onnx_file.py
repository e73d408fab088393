"""model.onnx gives our features at any batch and image size, and tells nothing of the machine that wrote it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from hybridssl import onnx_file, run
from hybridssl.__main__ import main
from hybridssl.errors import UserError
from hybridssl.export import export
from tests.hybridssl.exports import CONVOLUTIONS, make_run

BACKBONES = {
    "registers, five channels": {"channels": 5, "registers": 4},
    "layer scale, as DINOv2": {
        "name": "vit_small_patch14_reg4_dinov2",
        "args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
        "size": 28,
    },
    "convolution": {"name": "densenet121", "args": CONVOLUTIONS["densenet121"], "channels": 1, "size": 64},
}


@pytest.mark.timeout(900)  # the exporter loads most of torch first
@pytest.mark.parametrize("options", BACKBONES.values(), ids=BACKBONES.keys())
def test_onnxruntime_gives_our_features_and_the_card_runs(tmp_path, monkeypatch, capfd, options):
    folder, out = make_run(tmp_path / "run", **options), tmp_path / "out"
    assert main(["export", str(folder), "--out", str(out), "--onnx", "--license", "mit"]) == 0
    printed = capfd.readouterr()
    assert re.search(r"timm \S+, transformers \S+, onnxruntime \d[.]\de-\d\d\n", printed.out)
    assert printed.out.count("\n") == 3  # nothing of the exporter's
    assert f"next: python -m finetune probe --backbone {out} --data FOLDER" in printed.out
    assert printed.err == ""

    ours, state = run.load_backbone(folder)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    channels, size, step = state["backbone"]["channels"], state["backbone"]["image_size"], ours.patch_size
    for number, height, width in ((1, size, size), (3, size, size + step), (2, size + 2 * step, size)):
        images = torch.randn(number, channels, height, width)
        with torch.no_grad():
            tokens = ours(images)
        cls, patches = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(cls, tokens.cls.numpy(), atol=1e-4)
        np.testing.assert_allclose(patches, tokens.patches.numpy(), atol=1e-4)
        assert cls.std() > 1e-4  # not all zero, which would agree with anything

    raw = (out / "model.onnx").read_bytes()
    assert not re.search(rb"\.py\b|site-packages|/home|/tmp", raw)  # the exporter's stack traces
    card = (out / "README.md").read_text()
    assert re.search(r"\| onnxruntime \| \d\.\de[-+]\d\d \|", card)
    monkeypatch.chdir(out)
    names: dict = {}
    exec(re.search(r"With onnxruntime:\n\n```python\n(.*?)```", card, re.DOTALL)[1], names)
    with torch.no_grad():
        expected = ours(torch.zeros(1, channels, size, size)).cls.numpy()
    np.testing.assert_allclose(names["image_feature"], expected, atol=1e-4)


def test_a_file_that_differs_is_not_exported(tmp_path, monkeypatch):
    """The check reads the file: one made of other weights is found out."""
    write = onnx_file.write

    def other(folder: Path, input_size: list[int]) -> Path:
        wrong = tmp_path / "wrong"
        export(make_run(tmp_path / "other", step=8), wrong)
        (folder / "model.onnx").write_bytes(write(wrong, input_size).read_bytes())
        return folder / "model.onnx"

    monkeypatch.setattr(onnx_file, "write", other)
    with pytest.raises(
        UserError, match=r"not exported: the features of model\.onnx differ from the trained backbone's"
    ):
        export(make_run(tmp_path / "run"), tmp_path / "out", onnx=True)
    assert not (tmp_path / "out").exists()


def test_without_the_extra_the_message_names_it_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxscript" else object())
    folder = make_run(tmp_path / "run")
    monkeypatch.setattr("hybridssl.export.load_backbone", lambda *args: pytest.fail("work was done"))
    assert main(["export", str(folder), "--out", str(tmp_path / "out"), "--onnx"]) == 2
    assert capsys.readouterr().err == "error: --onnx needs onnxscript: pip install 'hybridssl[onnx]'\n"
    assert not (tmp_path / "out").exists()


def test_a_backbone_that_does_not_go_into_onnx_is_one_message(tmp_path, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("no such operator\nand a page of advice")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(UserError, match=r"does not go into ONNX \(RuntimeError: no such operator\): export without"):
        export(make_run(tmp_path / "run"), tmp_path / "out", onnx=True)
    assert not (tmp_path / "out").exists()
