"""The code of a model card: how to load the exported folder with each library. It runs as it stands in that folder,
and a test does so.

HERE stands for the repository's name until a push knows it.
"""

from __future__ import annotations

HERE = "ORG/NAME"

TIMM = """\
import timm, torch

folder = "local-dir:."  # this folder; from the hub: "hf-hub:ORG/NAME"
model = timm.create_model(folder, pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # PIL image -> tensor
images = torch.zeros(1, {channels}, {size}, {size})
with torch.no_grad():
"""
TRANSFORMERS = """\
import torch
from transformers import AutoImageProcessor, AutoModel

folder = "."  # this folder; from the hub: "ORG/NAME"
processor = AutoImageProcessor.from_pretrained(folder)  # processor(pil_image) -> pixel_values
model = AutoModel.from_pretrained(folder).eval()
images = torch.zeros(1, {channels}, {size}, {size})
with torch.no_grad():
"""
ONNX = """\
import numpy, onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
images = numpy.zeros((1, {channels}, {size}, {size}), numpy.float32)  # normalised as config.json says
image_feature, patch_features = session.run(None, {{"images": images}})  # [N, {dim}], [N, patches, {dim}]
"""
# What the two libraries give for a transformer: a row of tokens.
TIMM_TOKENS = "    tokens = model.forward_features(images)  # [N, {prefix} + patches, {dim}]\n"
TRANSFORMERS_TOKENS = "    tokens = model(pixel_values=images).last_hidden_state  # [N, {prefix} + patches, {dim}]\n"
TOKENS = "image_feature, patch_features = tokens[:, 0], tokens[:, {prefix}:]\n"
# And for a convolutional network, whose patch features are the cells of its last feature map.
TIMM_CELLS = """\
    feature_map = model.forward_features(images)  # [N, {dim}, height, width]
    image_feature = model.forward_head(feature_map, pre_logits=True)  # [N, {dim}]
patch_features = feature_map.flatten(2).transpose(1, 2)
"""
TRANSFORMERS_CELLS = """\
    output = model(pixel_values=images)
image_feature = output.pooler_output  # [N, {dim}]
patch_features = output.last_hidden_state.flatten(2).transpose(1, 2)
"""


def codes(channels: int, size: int, prefix: int, dim: int, onnx: bool) -> dict[str, str]:
    """Library -> its code. prefix: tokens before the patches, 0 for a convolutional network."""
    found = {
        "timm": TIMM + (TIMM_TOKENS + TOKENS if prefix else TIMM_CELLS),
        "transformers": TRANSFORMERS + (TRANSFORMERS_TOKENS + TOKENS if prefix else TRANSFORMERS_CELLS),
        **({"onnxruntime": ONNX} if onnx else {}),
    }
    return {name: code.format(channels=channels, size=size, prefix=prefix, dim=dim) for name, code in found.items()}
