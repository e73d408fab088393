"""An adapted backbone -> a folder in timm's hub layout that every verb takes as --backbone, checked before it appears.

config.json  model.safetensors   the backbone, as timm and `finetune.backbones` load it
head.safetensors                 the classifier on top; its metadata names the classes and what it reads
adapted.json                     what it was made from and by what
pretraining.safetensors          the images it has seen, where those of the original backbone are known
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from finetune.adapters import Classifier, LinearHead
from finetune.backbones import load
from finetune.encoder import Encoder
from finetune.foreign import forward_of
from finetune.task import Task
from hybridssl.errors import UserError
from hybridssl.export import NOT_EXPORTED, TOLERANCE
from hybridssl.files import writing
from hybridssl.views import normalise
from hybridssl.weights import weights_sha256


def save(folder: Path, classifier: Classifier, work: Task, trained_on: np.ndarray, about: dict[str, Any]) -> Path:
    """Write the folder, whole or not at all. The classifier goes to the CPU. trained_on: rows of the task.

    UserError when the features of the loaded folder differ from the trained ones, or when it cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with writing(partial):
            _write(partial, classifier.cpu().eval(), work, trained_on, about)
        _check(partial, classifier, work.encoder)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(folder: Path, classifier: Classifier, work: Task, trained_on: np.ndarray, about: dict[str, Any]) -> None:
    encoder, head = work.encoder, classifier.head
    tensors = {name: t.detach().contiguous().clone() for name, t in classifier.model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reads = head.readout if isinstance(head, LinearHead) else "patches"
    taught = [name for name, there in zip(work.classes, classifier.present.tolist(), strict=True) if there]
    facts = {"classes": list(work.classes), "taught": taught, "reads": reads, "head": type(head).__name__}
    weights = {name: t.detach().contiguous().clone() for name, t in head.state_dict().items()}
    save_file(weights, folder / "head.safetensors", metadata={name: json.dumps(value) for name, value in facts.items()})
    origin = {"backbone": encoder.name, "backbone_sha256": encoder.sha256, "index_sha256": work.index.sha256}
    _json(folder / "config.json", config(classifier, encoder))
    _json(folder / "adapted.json", {**origin, "sha256": weights_sha256(tensors), **facts, **about})
    if encoder.digests is not None:  # what was read before is known: so is all that it has read now
        own = np.asarray(work.index.column("digest"))[work.features.numbers[trained_on]]
        save_arrays({"digest": np.union1d(encoder.digests, own)}, folder / "pretraining.safetensors")


def config(classifier: Classifier, encoder: Encoder) -> dict[str, Any]:
    """config.json, with the size and normalisation that the encoder was asked with."""
    model: Any = classifier.model
    was = dict(model.pretrained_cfg)
    arguments = {name: value for name, value in getattr(model, "_model_args", {}).items() if name not in NOT_EXPORTED}
    size = encoder.input_size
    return {
        "architecture": was["architecture"],
        "num_classes": 0,
        "num_features": int(model.num_features),
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [encoder.channels, size, size],
            "fixed_input_size": bool(was.get("fixed_input_size", False)),
            "interpolation": "bicubic",
            "crop_pct": 1.0,  # the short side to the size, then the centre: as views.resize_for_eval
            "crop_mode": "center",
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "num_classes": 0,
            "first_conv": was.get("first_conv"),
            "classifier": was.get("classifier"),
            "custom_load": False,
        },
    }


@torch.inference_mode()
def _check(folder: Path, classifier: Classifier, encoder: Encoder) -> None:
    """The folder through the door that every verb takes, against the network that was trained."""
    shape = (2, encoder.channels, encoder.input_size, encoder.input_size)
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ours = forward_of(classifier.model)(normalise(images, encoder.mean, encoder.std))[0]
    theirs = load(str(folder)).features(images)["cls"]
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):  # NaN fails as well
        raise UserError(
            f"the adapted {encoder.name} is not saved: loaded again, its features differ by {difference:.1e}; "
            "install the timm version of constraints.txt"
        )


def _json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
