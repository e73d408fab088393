"""A text encoder inside a training run: it rests, moves by low-rank updates (LoRA), or moves altogether.

Student and teacher have one `TextTower` between them, which holds all that rests and is no part of either's state. What
moves is a module of its own (`Moving`), of which each has a copy: trained, averaged and saved like any other, and only
that. So a resting encoder costs no memory twice and is in no checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hybridssl import lora
from hybridssl.encoder import load_encoder, pooled, pooling_of, tokenise
from hybridssl.errors import UserError
from hybridssl.types import sent

How = Literal["frozen", "lora", "trained"]
RANK = 16
# Linear layers of a block in BERT, DistilBERT, CLIP and ModernBERT, as transformers names them.
LAYERS = (
    *("query", "key", "value", "dense"),
    *("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
    *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    *("Wqkv", "Wo", "Wi"),
)


class Moving(nn.Module):
    """The parameters of a text encoder that move, under its own names. lr_scale: factor of the learning rate."""

    def __init__(self, values: Mapping[str, Tensor], lr_scale: float) -> None:
        super().__init__()
        self.lr_scale = lr_scale
        for name, value in values.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(value))  # a module's names have no dots

    def named(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): parameter for name, parameter in self.named_parameters()}


class TextTower:
    """Sentences -> [N, width]. Without dropout, so that a sentence has one vector whatever batch it is in."""

    def __init__(self, encoder: str, pooling: str, how: How, most: int) -> None:
        """most: tokens after which a sentence is cut. UserError: no such encoder, or no layers for LoRA in it."""
        tokenizer, model, declared = load_encoder(encoder)
        for half in ("vision_model", "visual_projection"):  # of CLIP and its kin
            if hasattr(model, half):
                setattr(model, half, None)
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(_attention())
        self.tokenizer, self.most, self.pooling = tokenizer, most, pooling_of(pooling, declared)
        self.model = _Pooled(model, self.pooling).eval().requires_grad_(False)
        self.device = torch.device("cpu")
        if how == "lora":
            try:
                lora.add(model, RANK, layers=LAYERS)
            except UserError as error:
                raise UserError(f"{encoder}: {error}: choose objectives.text_pairs.tower=trained or frozen") from error
        elif how == "trained":
            model.requires_grad_(True)
        self.start = self._reached() if how != "frozen" else {}
        with torch.no_grad():
            self.width = self(["a"], {}, self.device).shape[1]
        for name, parameter in self.model.named_parameters():
            if name in self.start:
                parameter.data = parameter.data.new_empty(0)  # it is handed in from now on

    def __deepcopy__(self, memo: Any) -> TextTower:
        return self

    def __call__(self, sentences: Sequence[str], moving: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """moving: current values of what moves, by the names of `start`."""
        if device != self.device:
            self.model, self.device = self.model.to(device), device
        tokens = tokenise(self.tokenizer, self.model.inner, sentences, self.most)
        return functional_call(self.model, dict(moving), ({k: sent(v, device) for k, v in tokens.items()},))

    def _reached(self) -> dict[str, Tensor]:
        """Start values of the parameters that ask for a gradient and get one; DDP would wait for those that do not,
        such as an unused pooler. Afterwards none asks."""
        self(["a"], {}, self.device).sum().backward()
        found = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.requires_grad_(False).zero_grad(set_to_none=True)
        return found


def _attention() -> str:
    """The name of transformers' own SDPA attention with the one difference that it always takes a mask.

    By default transformers leaves the mask out where no token is padding, and asks the device for that in each pass.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, **given: Any) -> Tensor | None:
        return sdpa_mask(*args, **{**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    AttentionInterface.register("sdpa_masked", sdpa_attention_forward)
    AttentionMaskInterface.register("sdpa_masked", mask)
    return "sdpa_masked"


class _Pooled(nn.Module):
    def __init__(self, inner: nn.Module, pooling: str) -> None:
        super().__init__()
        self.inner, self.pooling = inner, pooling

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        return pooled(self.inner, tokens, self.pooling)
