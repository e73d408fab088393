"""Where image features meet words: class scores from text, for a run's label head and for models with a text half.

A `WordHead` gives every class of an evaluation a row in the space of the image features. A class that the labels of the
pretraining named has the row that was trained; any other is placed by its words alone, through the same map from text
to prototypes (hybridssl/text.py), fitted once more on the classes of the pretraining and held against what that kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from finetune.foreign import reason_of
from hybridssl import run, text, trust
from hybridssl.errors import UserError
from hybridssl.objectives.labels import projection
from hybridssl.text import ClassText
from shards.errors import DataError
from shards.index import Index
from shards.mix import open_sets

Array = np.ndarray
SAME = 0.999  # least cosine at which a prototype counts as made again


@dataclass(frozen=True)
class WordHead:
    """scale x cosine (or inner product) of projected image features with one row a class, plus a bias."""

    classes: tuple[str, ...]
    rows: Tensor  # [K, W]
    seen: tuple[str, ...]  # classes that the pretraining had labels of
    project: nn.Module | None = None  # from image features [N, D] to the space of the rows [N, W]; None: they share one
    cosine: bool = True
    scale: float = 1.0
    bias: Tensor | float = 0.0
    kept: dict[str, float] = field(default_factory=dict)  # new class -> share of its text that the map can place
    notes: tuple[str, ...] = ()

    def logits(self, x: Array) -> Array:
        """float32 [N, D] -> float64 [N, K]."""
        z = torch.from_numpy(x).double()
        if self.project is not None:
            with torch.no_grad():
                z = self.project.double()(z)
        rows = self.rows.double()
        if self.cosine:
            z, rows = F.normalize(z, dim=1), F.normalize(rows, dim=1)
        return (self.scale * (z @ rows.T) + self.bias).numpy()


def words(path: Path | None, beside: Path, classes: Sequence[str]) -> list[ClassText]:
    """What is known of each class: from the table that was given, else the classes.csv beside the shards, else its key.

    UserError when a table that was given lacks a class.
    """
    if path is None and not (beside / "classes.csv").is_file():
        return [ClassText(c, text.plain(c)) for c in classes]
    file = path or beside / "classes.csv"
    table = text.read_classes(file)
    if path is None:
        table += [ClassText(c, text.plain(c)) for c in classes if c not in {t.key for t in table}]
    return [table[k] for k in text.select(classes, [t.key for t in table], f"class table {file}")]


# ------------------------------------------------------------------------------------------------- a run's label head


def of_run(folder: Path, index: Index, known: Sequence[ClassText], path: Path | None, encoder: str | None) -> WordHead:
    """The label head of a run, with a row for each class of `known`. UserError when text cannot place one of them.

    path, encoder: the class table and the text encoder that the user named. A linear head, whose rows are not of unit
    length, takes a class that it was not trained on at the mean length and with the mean bias of the others.
    """
    state, options, weight, bias, project = _open(folder)
    trained, notes = list(state["data"]["classes"]), []
    start = _start(folder, trained)
    labelled = _labelled(state, index, options["kind"])
    if labelled is None:
        labelled = set(trained)
        notes.append("the pretraining index is not here, so every class of the label head counts as labelled")
    seen = [c.key for c in known if c.key in labelled]
    new = [c for c in known if c.key not in trained]
    placed, kept = _place(new, folder, state, index, start, path, encoder) if new else ({}, {})
    mine = [trained.index(c) for c in seen] or list(range(len(trained)))
    if 0 < len(seen) < len(known):
        moved = F.cosine_similarity(weight[mine], start[mine]).mean()
        notes.append(
            f"trained prototypes stand at a mean cosine of {moved:.2f} to where text put them and puts the rest"
        )
    length, usual = weight[mine].norm(dim=1).mean(), bias[mine].mean()
    rows, biases = [], []
    for c in (c.key for c in known):
        at = trained.index(c) if c in trained else None
        text_row = placed[c] if at is None else start[at]
        rows.append(weight[at] if c in seen else text_row * length)
        biases.append(bias[at] if c in seen else usual)
    cosine = options["head"] != "linear"
    return WordHead(
        tuple(c.key for c in known),
        torch.stack(rows),
        tuple(seen),
        project=project,
        cosine=cosine,
        scale=float(options["scale"]) if cosine else 1.0,
        bias=torch.stack(biases).double(),
        kept=kept,
        notes=tuple(notes),
    )


def _open(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Tensor, Tensor, nn.Module | None]:
    """(state, options of the label head, its rows [K, D], its bias [K], what lies before its rows) of the teacher in
    the newest checkpoint."""
    if (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is an exported backbone, which carries no label head and no class prototypes: give zeroshot the "
            "run folder that it was exported from"
        )
    state = run.read_state(folder)
    options = (state["recipe"].get("objectives") or {}).get("labels")
    tensors = run.read_tensors(folder)
    weight = tensors.get("teacher.objectives.labels.weight")
    if not options or weight is None:
        raise UserError(
            f"{folder} was trained without a label head, so it has no class prototypes: pretrain with "
            "objectives.labels.init=text, or evaluate with knn, probe or fewshot"
        )
    if options["init"] != "text":
        raise UserError(
            f"the class prototypes of {folder} started from random numbers, which place no class that was not trained: "
            "pretrain with objectives.labels.init=text and a text encoder"
        )
    bias = tensors.get("teacher.objectives.labels.bias")
    project = None
    if options["head"] == "mlp":
        before = "teacher.objectives.labels.project."
        project = projection(weight.shape[1])
        project.load_state_dict({k.removeprefix(before): t for k, t in tensors.items() if k.startswith(before)})
    return state, options, weight.float(), torch.zeros(len(weight)) if bias is None else bias.float(), project


def _start(folder: Path, trained: Sequence[str]) -> Tensor:
    """Where the text put the prototypes of the training classes, unit rows [K, D]: the run keeps it."""
    path = run.latest(folder).absolute().parent.parent / "prototypes.safetensors"
    try:
        with safe_open(path, "pt") as file:
            start = F.normalize(file.get_tensor("initial").float(), dim=1)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({reason_of(error)}): it says where the text put the class prototypes, which "
            "zeroshot needs; copy the whole run folder"
        ) from error
    if len(start) != len(trained):
        raise UserError(
            f"{path} holds {len(start)} prototypes, the run has {len(trained)} classes: is it another run's?"
        )
    return start


def _labelled(state: dict[str, Any], index: Index, kind: str) -> set[str] | None:
    """Classes that the images of the pretraining had as labels; None when its index cannot be had.

    An index knows the classes of all its splits, and so does the head: a class that only test images have is in both.
    """
    about, own = state["data"], index
    if index.sha256 != about["index_sha256"]:
        try:
            own = open_sets(about["index"])
        except DataError:
            return None
        if own.sha256 != about["index_sha256"]:
            return None
    rows = own.select(about["splits"])
    label = own.column("label")[rows]
    found = {own.classes[k] for k in np.unique(label[label >= 0])}
    if kind == "multi":  # the column holds an image's first label only
        for i in rows[label >= 0]:
            if len(found) == len(own.classes):
                break
            found.update(own.read(int(i)).labels)
    return found


def _place(
    new: Sequence[ClassText],
    folder: Path,
    state: dict[str, Any],
    index: Index,
    start: Tensor,
    path: Path | None,
    encoder: str | None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Unit rows of classes that the head has none of, and how much of their text the map can express.

    The map is fitted on the training classes again, with the recipe's own settings, and must bring back the prototypes
    that the run started from: otherwise the words, the encoder or its version are not those of the pretraining.
    """
    recipe = state["recipe"]["text"]
    name = encoder or recipe["encoder"] or _cached_encoder(recipe["cache"])
    if not name:
        raise UserError(
            f"the recipe of {folder} names no text encoder (its embeddings came from a file): give the one that made "
            f"them with --encoder, to place {', '.join(c.key for c in new)}"
        )
    trained, templates, tried = state["data"]["classes"], tuple(recipe["templates"]), []
    width, seed = start.shape[1], state["recipe"]["seed"]
    for where, table in _tables(path, recipe["classes"], state["data"]["index"], index.root, trained):
        old = text.embed_classes(name, table, templates, recipe["pooling"])
        fitted = text.fit_map(old, width, recipe["shrinkage"], seed)
        if float((fitted(old) * start).sum(1).min()) >= SAME:
            embedded = text.embed_classes(name, new, templates, recipe["pooling"])
            rows, kept = fitted(embedded), text.expressed(old, embedded)
            return (
                {c.key: row for c, row in zip(new, rows, strict=True)},
                {c.key: float(k) for c, k in zip(new, kept, strict=True)},
            )
        tried.append(where)
    raise UserError(
        f"the prototypes that {folder} started from cannot be made again with {name} and the words of "
        f"{', '.join(tried)}: give the encoder of the pretraining with --encoder and its class table with --text"
    )


def _cached_encoder(cache: str) -> str:
    return text.load_cache(cache)[1]["encoder"] if cache and Path(cache).is_file() else ""


def _tables(
    path: Path | None, recipe: str, pretrained: str | list[str], here: Path, trained: Sequence[str]
) -> list[tuple[str, list[ClassText]]]:
    """Where the words of the training classes may be, each with its name; the plain keys last."""
    folders = [pretrained] if isinstance(pretrained, str) else pretrained
    beside = [Path(folder) / "classes.csv" for folder in (*folders, here)]
    places = [path, Path(recipe) if recipe else None, *beside]
    found: list[tuple[str, list[ClassText]]] = []
    for place in dict.fromkeys(p for p in places if p is not None and p.is_file()):
        table = {c.key: c for c in text.read_classes(place)}
        if all(c in table for c in trained):
            found.append((str(place), [table[c] for c in trained]))
    return [*found, ("the class names", [ClassText(c, text.plain(c)) for c in trained])]


# -------------------------------------------------------------------------------------- models that have a text half


def of_two_towers(
    spec: str, known: Sequence[ClassText], dim: int, templates: Sequence[str] = text.TEMPLATES
) -> WordHead:
    """CLIP, SigLIP and their kin, by their own text half. dim: of the image features. UserError for other models."""
    from transformers import AutoModel

    name = spec.removeprefix("hf:")
    try:
        trust.transformers_config(name)
        model, loaded = AutoModel.from_pretrained(
            name, use_safetensors=True, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except UserError:
        raise
    except Exception as error:  # configuration, file, network and import errors of transformers
        raise UserError(f"cannot load {spec}: {reason_of(error)}") from error
    if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
        raise UserError(
            f"{spec} is a {type(model).__name__} and has no text half: zeroshot needs a run folder with a label head "
            "that started from text, or a CLIP-like model"
        )
    if loaded["missing_keys"]:
        raise UserError(
            f"{spec} lacks {len(loaded['missing_keys'])} tensors of a {type(model).__name__} (first: "
            f"{min(loaded['missing_keys'])}): its image and text halves do not meet in one space"
        )
    project = getattr(model, "visual_projection", None)
    if project is None and dim != model.config.text_config.hidden_size:
        raise UserError(f"{spec}: a {type(model).__name__} is not known to bring images and text into one space")
    return WordHead(
        tuple(c.key for c in known),
        text.embed_classes(name, known, templates),
        seen=(),
        project=project,
        scale=float(model.logit_scale.detach().exp()),
        bias=float(model.logit_bias.detach()) if hasattr(model, "logit_bias") else 0.0,
        notes=("which diagnoses the texts and images of its pretraining showed is not known",),
    )
