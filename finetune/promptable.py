"""A promptable segmenter (Segment Anything, 2304.02643, by transformers' SamModel), and prompts drawn from the truth.

    model = load_promptable("hf:facebook/sam-vit-base", "cuda")
    memory = model.embed(images)                            # uint8 [N, 3, T, T]: the costly half, once an image
    masks = model.decode(memory, prompts, size)             # a prompt an image -> uint8 [N, size, size]

A simulated prompt knows where the truth is, as the person who would give it does, but not to the pixel: sides of boxes
and points are moved at random. It is one guess at what people do, so figures hold for such prompts and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.foreign import reason_of
from hybridssl import hub, trust
from hybridssl.errors import UserError
from hybridssl.views import normalise
from hybridssl.weights import weights_sha256

Array = np.ndarray
KINDS = {"box": 0, "point": 1, "points": 3}  # kind of prompt -> its number of points
PROMPTS = {"box": "a box", "point": "1 point", "points": "3 points"}  # for people
JITTER = 0.05  # standard deviation of a side or point, as a share of the width or height of the lesion's box


@dataclass(frozen=True)
class Prompt:
    """Shares of the image's side, x before y: a box [4] (left, top, right, bottom), or points [P, 2] in the lesion."""

    box: Array | None = None
    points: Array | None = None


@dataclass(frozen=True)
class Promptable:
    model: nn.Module
    name: str
    sha256: str
    size: int  # T, pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: str

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, T, T] -> what `decode` takes, [N, D, h, w]."""
        model: Any = self.model
        return model.get_image_embeddings(normalise(images.to(self.device), self.mean, self.std))

    @torch.inference_mode()
    def decode(self, memory: Tensor, prompts: Sequence[Prompt], size: int) -> Array:
        """One prompt an image, all of one kind -> masks uint8 [N, size, size].

        A single point may mean a part or the whole: of the three masks proposed for it the one that the model itself
        trusts most is taken; a box or several points get its single mask (as in the published code).
        """
        asked: dict[str, Tensor] = {}
        if prompts[0].box is not None:
            asked["input_boxes"] = self._pixels([p.box for p in prompts])[:, None]  # [N, 1, 4]
        else:
            asked["input_points"] = self._pixels([p.points for p in prompts])[:, None]  # [N, 1, P, 2]
            asked["input_labels"] = torch.ones(asked["input_points"].shape[:3], dtype=torch.long, device=self.device)
        single = prompts[0].points is not None and len(prompts[0].points) == 1
        out = self.model(image_embeddings=memory, multimask_output=single, **asked)
        best = out.iou_scores[:, 0].argmax(1)  # [N]
        logits = out.pred_masks[torch.arange(len(best)), 0, best][:, None]
        logits = F.interpolate(logits.float(), size=(size, size), mode="bilinear", align_corners=False)
        return (logits[:, 0] > 0).to(torch.uint8).cpu().numpy()

    def _pixels(self, shares: Sequence[Array | None]) -> Tensor:
        return torch.tensor(np.stack([s for s in shares if s is not None]) * self.size, dtype=torch.float32).to(
            self.device
        )


def load_promptable(spec: str, device: str = "cpu") -> Promptable:
    """`hf:ID`, or a folder that holds a SamModel and its processor, with or without `hf:`. UserError names `spec`."""
    from transformers import AutoConfig, SamImageProcessor, SamModel

    name = spec.removeprefix("hf:")
    local = hub.is_here(name)
    if not local:
        hub.require(spec)
    options: dict[str, Any] = {"local_files_only": local}
    try:
        trust.transformers_config(name, **options)
        kind = AutoConfig.from_pretrained(name, trust_remote_code=False, **options).model_type
        if kind != "sam":
            raise UserError(f"--promptable {spec} is a {kind} model, and must be a SamModel like facebook/sam-vit-base")
        processor = SamImageProcessor.from_pretrained(name, **options)
        model: Any = SamModel.from_pretrained(name, use_safetensors=True, **options)
    except UserError:
        raise
    except Exception as error:  # configuration, file, network and import errors of transformers
        raise UserError(f"cannot load --promptable {spec}: {reason_of(error)}") from error
    size = model.config.vision_config.image_size
    model.to(device).eval().requires_grad_(False)
    sha = weights_sha256(model.state_dict())
    return Promptable(model, spec, sha, size, tuple(processor.image_mean), tuple(processor.image_std), device)


def simulate(kind: str, mask: Array, rng: np.random.Generator) -> Prompt:
    """A prompt of one of KINDS for a mask [S, S] that is not empty, as somebody would give who sees the lesion.

    box: its bounding box, each side moved. point: the point farthest from the border, moved. points: that, and others
    drawn from inside it. A point that lands outside is drawn again, for nobody clicks beside what they see.
    """
    height, width = mask.shape
    y, x = np.nonzero(mask)
    box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], dtype=float)
    extent = np.array([box[2] - box[0], box[3] - box[1]])
    scale = np.array([width, height], dtype=float)
    if kind == "box":
        noise = np.clip(rng.normal(0, JITTER, 4), -0.25, 0.25)  # so that opposite sides cannot change places
        moved = np.clip(box + noise * np.tile(extent, 2), 0, np.tile(scale, 2))
        return Prompt(box=moved / np.tile(scale, 2))
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    deep = np.argwhere(depth >= np.median(depth[mask > 0]))  # the inner half: nobody aims at the rim
    aims = [np.unravel_index(int(depth.argmax()), depth.shape)]
    aims += [deep[i] for i in rng.integers(len(deep), size=KINDS[kind] - 1)]
    return Prompt(points=np.stack([_click(np.array(aim)[::-1] + 0.5, extent, mask, rng) / scale for aim in aims]))


def _click(aim: Array, extent: Array, mask: Array, rng: np.random.Generator, tries: int = 20) -> Array:
    """A point (x, y) near `aim` that lies on the mask."""
    for _ in range(tries):
        point = aim + rng.normal(0, JITTER, 2) * extent
        x, y = np.floor(point).astype(int)
        if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x]:
            return point
    return aim  # a thread of a lesion: only its middle can be hit
