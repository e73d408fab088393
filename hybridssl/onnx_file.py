"""An exported backbone as model.onnx, for runtimes that have no PyTorch, checked in onnxruntime against the original.

images [N, C, H, W], float32, normalised -> image_feature [N, D], patch_features [N, P, D]. N, H and W are free, H and W
as far as the architecture lets them be.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from hybridssl.backbone import Backbone
from hybridssl.errors import UserError
from hybridssl.quiet import quiet

NEEDED = ("onnx", "onnxscript", "onnxruntime")
OUTPUTS = ["image_feature", "patch_features"]
TOLERANCE = 1e-4  # times the largest feature: another runtime sums in another order


def require() -> None:
    """UserError when a package of the extra is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs {', '.join(missing)}: pip install 'hybridssl[onnx]'")


def write(folder: Path, input_size: list[int]) -> Path:
    """FOLDER/model.onnx from the exported backbone in FOLDER. UserError where PyTorch cannot put it into ONNX."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    free = {"images": {0: torch.export.Dim("batch"), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}
    path = folder / "model.onnx"
    try:
        with quiet(prints=True), torch.no_grad():
            program: Any = torch.onnx.export(
                _Features(model),
                (torch.zeros(2, *input_size),),
                input_names=["images"],
                output_names=OUTPUTS,
                dynamic_shapes=free,
                dynamo=True,
                verbose=False,
            )
            path.write_bytes(_anonymous(program.model_proto).SerializeToString())
    except OSError:
        raise
    except Exception as error:  # whatever another version of the exporter stumbles over, or more than ONNX's 2 GB
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(
            f"not exported: this backbone does not go into ONNX ({reason}): export without --onnx"
        ) from error
    return path


@torch.no_grad()
def check(backbone: Backbone, path: Path, batches: Iterable[Tensor]) -> float:
    """Largest difference between the backbone's features and those of the file. UserError above TOLERANCE."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    far = scale = 0.0
    for images in batches:
        tokens = backbone.cpu().float()(images)
        for ours, theirs in zip(
            (tokens.cls, tokens.patches), session.run(OUTPUTS, {"images": images.numpy()}), strict=True
        ):
            far = max(far, float((ours - torch.from_numpy(theirs)).abs().max()))
            scale = max(scale, float(ours.abs().max()))
    if not far <= TOLERANCE * scale:  # NaN fails as well
        raise UserError(
            f"not exported: the features of model.onnx differ from the trained backbone's by {far:.1e}, more than "
            "rounding: install the onnxruntime version of constraints.txt, or export without --onnx"
        )
    return far


class _Features(nn.Module):
    """The two outputs of a timm model, a transformer's or a convolutional network's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.model.forward_features(images)
        if x.ndim == 3:
            return x[:, 0], x[:, self.model.num_prefix_tokens :]
        return self.model.forward_head(x, pre_logits=True), x.flatten(2).transpose(1, 2)


def _anonymous(proto: Any) -> Any:
    """The exporter notes a stack trace at every node, with the paths of this machine: none of it leaves it."""
    del proto.graph.value_info[:]
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.functions):
        del part.metadata_props[:]
        part.doc_string = ""
    return proto
