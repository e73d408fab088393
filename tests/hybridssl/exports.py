"""A run folder as the training loop leaves it, for whatever is made of one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from hybridssl import backbone, files
from hybridssl.backbone import BackboneOptions
from hybridssl.recipe import to_dict

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
CONVOLUTIONS = {
    "densenet121": {"growth_rate": 4, "block_config": (1, 1, 1, 1)},
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)},
}
NASTY = "a|b <script>alert(1)</script> ](x) `c` \n---\n# head"
RECIPE = {
    "data": {"train": "/home/somebody/ward-7/derm", "probe": "sets/ward-7/held out"},
    "stream": {"exclude": "s3://ward-7/audits/derm.json?signed=somebody, audit/ward-7/b.json"},
    "backbone": {"weights": "timm/vit_small"},
    "text": {"encoder": "ward-7/deep/bert", "templates": ["```", NASTY]},
    "seed": 3,
}


def make_run(
    folder: Path, channels: int = 3, size: int = 32, name: str = "vit_tiny_patch16_224", step: int = 7, **options
) -> Path:
    """A run folder with weights that differ between student and teacher."""
    chosen = BackboneOptions(name=name, args=options.pop("args", TINY), **options)
    tensors = {}
    for seed, who in enumerate(("student", "teacher")):
        torch.manual_seed(seed + 10 * step)
        module = backbone.build(chosen, channels, size)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        tensors |= {f"{who}.backbone.{k}": v for k, v in module.state_dict().items()}
    checkpoint = folder / f"checkpoints/step-{step}"
    checkpoint.mkdir(parents=True)
    save_file(tensors, checkpoint / "model.safetensors")
    state = {
        "format": "hybridssl-run",
        "version": 1,
        "step": step,
        "images": 1234,
        "recipe": RECIPE,
        "backbone": {
            "options": to_dict(chosen),
            "channels": channels,
            "image_size": size,
            "mean": [0.5] * channels,
            "std": [0.2] * channels,
        },
        "data": {
            "index": "/home/somebody/ward-7/derm",
            "index_sha256": "ab",
            "splits": ["train", ""],
            "samples": 55,
            "position": 1234,
            "synthetic": False,
            "classes": ["mel", NASTY],
            "sources": ["clinic", NASTY],
        },
        "sha256": {"model.safetensors": files.sha256(checkpoint / "model.safetensors")},
    }
    (checkpoint / "state.json").write_text(json.dumps(state))
    (folder / "checkpoints/latest").write_text(checkpoint.name)
    return folder
