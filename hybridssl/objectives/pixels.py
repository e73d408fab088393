"""Masked pixel regression: give back what the hidden patches show (MAE, arXiv 2111.06377; SimMIM, arXiv 2111.09886)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
from lightly.models.utils import normalize_mean_var, patchify
from torch import Tensor, nn

from hybridssl.dist import all_reduce_sum, world_size
from hybridssl.errors import UserError
from hybridssl.heads import fp32
from hybridssl.objectives import Context, Objective, ObjectiveOptions
from hybridssl.types import Batch, Tokens, ViewTokens

HEAD_WIDTH = 32  # of the decoder's attention, as in MAE


@dataclass(frozen=True)
class Options(ObjectiveOptions):
    style: Literal["simmim", "mae"] = "simmim"  # mae wants views.mask_probability=1 and one views.mask_ratio, 0.75
    width: int = 192  # of mae's decoder; half of the encoder's is enough (MAE, table 1b)
    depth: int = 4  # blocks of mae's decoder; more helps frozen features, not fine-tuning (MAE, table 1a)


class Pixels(Objective):
    """The pixels of hidden patches, each patch normalised by its own mean and deviation.

        t_p = (x_p - mean x_p) / sqrt(var x_p + 1e-6)        over all pixels and channels of patch p (MAE, section 3)
        mae      loss = mean over hidden p and pixels of (y_p - t_p)^2,  y = decoder(encoder(visible patches))
        simmim   loss = mean over hidden p and pixels of |y_p - t_p|,    y = W encoder(all places, hidden ones a mask
                 token) + b (section 3.4; the paper's targets are not normalised)

    The mean is over the hidden patches of all views of all micro-batches and processes. mae encodes the global views
    a second time, without their hidden patches, beside objectives that need them whole; its decoder is fed the class
    token too, which has no other teacher, and the registers not, for nothing reads them later.

    The target is the view as it is rendered and not the stored crop. What is hidden can only be inferred from what is
    seen, in the colours in which it is seen: the crop before jitter, grey and blur cannot be, and would be noise.
    """

    options: Options
    expects = (
        "Starts near 1 (mae) or 0.8 (simmim), the size of the normalised target itself, and falls fast, then slowly; "
        "stuck there, every patch is predicted as flat."
    )

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__(options, context)
        mae = options.style == "mae"
        self.views = frozenset({"visible" if mae else "global"})
        self.masked = not mae
        self.patch = context.patch
        self.decoder = Decoder(context.dim, options.width, options.depth, context.patches) if mae else None
        self.predict = nn.Linear(options.width if mae else context.dim, context.channels * context.patch**2)
        nn.init.trunc_normal_(self.predict.weight, std=0.02)
        nn.init.zeros_(self.predict.bias)

    def targets(self, teacher: Sequence[ViewTokens], batches: Sequence[Batch], progress: float) -> list[Tensor]:
        """For each micro-batch the factor that turns the sum over its hidden patches into its share of the mean."""
        hidden = all_reduce_sum(torch.stack([batch.masks.sum() for batch in batches]).sum())
        return [len(batches) * world_size() / hidden.clamp_min(1)] * len(batches)

    def forward(self, student: ViewTokens, target: Tensor, batch: Batch, progress: float) -> dict[str, Tensor]:
        assert student.views is not None
        if self.decoder is None:
            patches, distance = student.global_.patches, F.l1_loss
        else:
            assert student.visible is not None
            patches, distance = self.decoder(student.visible, batch.masks.flatten(0, 1)), F.mse_loss
        hidden = patches.flatten(0, 1).index_select(0, batch.hidden)
        wanted = normalize_mean_var(patchify(student.views.global_, self.patch)).flatten(0, 1)[batch.hidden]
        losses = distance(fp32(self.predict(hidden)), wanted, reduction="none").mean(dim=1)  # [M]
        return {"pixels": losses.sum() * target}


class Decoder(nn.Module):
    """MAE's decoder: mask tokens in the hidden places, fixed sine-cosine positions, a few narrow blocks (lightly's)."""

    def __init__(self, dim: int, width: int, depth: int, patches: int) -> None:
        super().__init__()
        if width % HEAD_WIDTH:
            near = max(round(width / HEAD_WIDTH), 1) * HEAD_WIDTH
            raise UserError(f"objectives.pixels.width={width} is no multiple of {HEAD_WIDTH}: try {near}")
        self.embed = nn.Linear(dim, width)
        self.blocks = MaskedVisionTransformerDecoderTIMM(
            num_patches=patches, embed_dim=width, depth=depth, num_heads=width // HEAD_WIDTH, num_prefix_tokens=1
        )

    def forward(self, visible: Tokens, masks: Tensor) -> Tensor:
        """Tokens of the visible patches [N, V, dim], masks [N, P] with V places that are not hidden -> tokens of
        all patches [N, P, width] in the order of the grid."""
        seen = self.embed(torch.cat([visible.cls[:, None], visible.patches], dim=1))  # [N, 1 + V, width]
        places = seen.new_zeros(*masks.shape, seen.shape[2]).masked_scatter(~masks[:, :, None], seen[:, 1:])
        hidden = torch.cat([masks.new_zeros(len(masks), 1), masks], dim=1)
        return self.blocks(torch.cat([seen[:, :1], places], dim=1), mask=hidden)[:, 1:]
