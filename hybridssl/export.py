"""A run's backbone -> a folder in timm's hub layout that timm and transformers load unchanged, checked first.

config.json  model.safetensors     what the two libraries read
model.onnx                         the same for runtimes without PyTorch, where asked for
README.md                          the model card
pretraining.json  .safetensors     what was read in pretraining: counts, recipe, image digests
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from hybridssl import onnx_file
from hybridssl.backbone import Backbone
from hybridssl.card import card
from hybridssl.errors import UserError
from hybridssl.quiet import quiet
from hybridssl.run import homes, latest, load_backbone
from hybridssl.stated import Stated
from hybridssl.weights import weights_sha256

TOLERANCE = 1e-5
# TimmWrapper gives num_classes itself, and twice is an error; stochastic depth is a choice of the training.
NOT_EXPORTED = ("num_classes", "drop_path_rate")
HUB_IDS, SENTENCES = ("weights", "encoder"), ("templates",)  # keys of the recipe
PRETRAINING = ("index_sha256", "splits", "samples", "sources", "classes", "synthetic")


@dataclass(frozen=True)
class Report:
    """What an export did."""

    out: Path
    step: int
    parity: Mapping[str, float]  # library -> largest absolute difference over all features of all test images
    results: int  # results.json that the card shows


def export(
    run: str | Path,
    out: str | Path,
    which: str = "teacher",
    stated: Stated | None = None,
    overwrite: bool = False,
    onnx: bool = False,
) -> Report:
    """Export the newest checkpoint of `run` (or one checkpoint folder). `out` appears whole and checked, or not at all.

    UserError: not a run, `out` in the way, results of other weights, or features that differ in any of the libraries.
    """
    checkpoint, out = latest(run), Path(out).resolve()
    _check_room(out, overwrite)
    if onnx:
        onnx_file.require()
    backbone, state = load_backbone(checkpoint, which)
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for home in homes(checkpoint):
            if (read := home / "pretraining.safetensors").is_file():
                shutil.copyfile(read, partial / read.name)
                break
        report = _write(partial, out, backbone, state, which, stated or Stated(), onnx)
        _swap(partial, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _swap(partial: Path, out: Path) -> None:
    """Put `partial` in the place of `out`, whose former content goes only when the new one is there."""
    old = out.with_name(out.name + ".old")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _write(
    folder: Path, out: Path, backbone: Backbone, state: Mapping[str, Any], which: str, stated: Stated, onnx: bool
) -> Report:
    tensors = {k: v.detach().cpu().contiguous() for k, v in backbone.model.state_dict().items()}
    results = stated.of(weights_sha256(tensors))
    config, about = timm_config(backbone, state["backbone"]), pretraining(state)
    _write_json(folder / "config.json", config)
    _write_json(folder / "pretraining.json", about)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    size = config["pretrained_cfg"]["input_size"]
    parity = check_parity(backbone, folder, size)
    if onnx:
        parity["onnxruntime"] = onnx_file.check(
            backbone, onnx_file.write(folder, size), _images(size, backbone.patch_size)
        )
    prefix = backbone.prefix if backbone.maskable else 0
    text = card(out.name, config, prefix, about, which, parity, stated, results)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return Report(out, state["step"], parity, len(results))


def _check_room(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    ours = out.is_dir() and (not any(out.iterdir()) or (out / "pretraining.json").is_file())
    if not ours:
        raise UserError(f"{out} exists and is not an export: name another folder with --out")
    if not overwrite and any(out.iterdir()):
        raise UserError(f"{out} exists: add --overwrite to replace it, or name another folder with --out")


def timm_config(backbone: Backbone, description: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for timm and TimmWrapper. description: the `backbone` section of state.json."""
    size, channels = description["image_size"], description["channels"]
    about: Any = backbone.model.pretrained_cfg
    made_with: dict[str, Any] = backbone.model._model_args  # type: ignore[assignment]  # as timm's factory noted them
    return {
        "architecture": description["options"]["name"],
        "num_classes": 0,
        "num_features": backbone.dim,
        "model_args": {k: v for k, v in made_with.items() if k not in NOT_EXPORTED},
        "pretrained_cfg": {
            "input_size": [channels, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,  # the short side to the size, then the centre: as views.resize_for_eval
            "crop_mode": "center",
            "mean": list(description["mean"]),
            "std": list(description["std"]),
            "num_classes": 0,
            "first_conv": about["first_conv"],
            "classifier": about["classifier"],
            "custom_load": False,
        },
    }


def pretraining(state: Mapping[str, Any]) -> dict[str, Any]:
    """pretraining.json: what the backbone has seen, without the paths of the machine that it was trained on."""
    data = {key: state["data"][key] for key in PRETRAINING} | {"before": state["data"].get("before", [])}
    recipe = _portable(state["recipe"])
    return {**data, "step": state["step"], "images": state["images"], "recipe": recipe}


def _portable(value: Any, key: str = "") -> Any:
    """Paths and addresses -> their last part: folder names tell more about a hospital than a published model should.

    Hub ids, which say where weights came from, and sentences stay.
    """
    if isinstance(value, Mapping):
        return {k: _portable(v, k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(v, key) for v in value]
    if not isinstance(value, str) or not re.search(r"[/\\]", value) or key in SENTENCES:
        return value
    if key in HUB_IDS and re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        return value
    parts = (part.partition("?")[0].rstrip("/\\ ") for part in value.split(","))  # a signed address carries its key
    return ",".join(re.split(r"[/\\]", part)[-1] for part in parts)


# --------------------------------------------------------------------------------------------------------- the check


@torch.no_grad()
def check_parity(backbone: Backbone, folder: Path, input_size: list[int]) -> dict[str, float]:
    """Largest difference between our tokens and those of each library's reading of `folder`.

    Position embeddings are resampled off the training size, and libraries differ there, so an oblong size is checked
    too. UserError above TOLERANCE, and where a library cannot load or run it.
    """
    images = list(_images(input_size, backbone.patch_size))
    ours = [torch.cat([t.cls[:, None], t.registers, t.patches], dim=1) for t in map(backbone.cpu().float(), images)]
    found = {}
    for library, load in LOADERS.items():
        advice = f"install the {library} version of constraints.txt, which is known to agree"
        try:
            with quiet():
                model = load(folder)
            theirs = [model(x) for x in images]
            found[library] = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
        except Exception as error:  # whatever another version of a library makes of the folder
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise UserError(f"not exported: {library} cannot use the result ({reason}): {advice}") from error
        if not found[library] <= TOLERANCE:  # NaN fails as well
            raise UserError(
                f"not exported: the features that {library} gives differ from the trained backbone's by "
                f"{found[library]:.1e}, more than rounding ({TOLERANCE:.0e}): {advice}"
            )
    return found


def _images(input_size: list[int], patch: int) -> Iterator[Tensor]:
    channels, height, width = input_size
    draw = torch.Generator().manual_seed(0)
    for h, w in ((height, width), (height + patch, width + 2 * patch)):
        yield torch.randn(2, channels, h, w, generator=draw)


def _with_timm(folder: Path) -> Callable[[Tensor], Tensor]:
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()

    def tokens(images: Tensor) -> Tensor:
        x = model.forward_features(images)
        return x if x.ndim == 3 else _joined(model.forward_head(x, pre_logits=True), x)

    return tokens


def _with_transformers(folder: Path) -> Callable[[Tensor], Tensor]:
    from transformers import AutoModel
    from transformers.utils import logging as chatter

    chatter.disable_progress_bar()
    model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False).eval()

    def tokens(images: Tensor) -> Tensor:
        out = model(pixel_values=images)
        return out.last_hidden_state if out.last_hidden_state.ndim == 3 else _joined(out.pooler_output, out[0])

    return tokens


def _joined(pooled: Tensor, cells: Tensor) -> Tensor:
    """What a convolution gives as one row of tokens: [N, D] and [N, D, h, w] -> [N, 1 + h w, D]."""
    return torch.cat([pooled[:, None], cells.flatten(2).transpose(1, 2)], dim=1)


LOADERS = {"timm": _with_timm, "transformers": _with_transformers}


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
