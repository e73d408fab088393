"""Class names and definitions -> text embeddings -> label prototypes, and the file that caches the embeddings.

A label head with one prototype a class can start from what the classes mean instead of from noise: clinically close
classes start close. The encoder is any transformers text model; it runs once, its embeddings are cached.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridssl.encoder import embed_sentences
from hybridssl.errors import UserError

TEMPLATES = ("{}", "a clinical image of {}", "an image showing {}")
EXAMPLE = "class,name,synonyms,definition\nmel,melanoma,malignant melanoma|MM,a malignant tumour of melanocytes\n"


@dataclass(frozen=True)
class TextOptions:
    encoder: str = ""  # text encoder: hub id, folder, or package:NAME (a package with get_model_path()); "": no text
    classes: str = ""  # CSV: class,name,synonyms,definition (synonyms separated by |); "": the class names as they are
    cache: str = ""  # embeddings file: read when it is there, else written
    templates: tuple[str, ...] = TEMPLATES  # sentences that a name or synonym is put into, at {}
    pooling: str = "auto"  # auto | cls | mean: sentence vector from token vectors; auto asks the model, else mean
    shrinkage: float = 0.5  # 1: the encoder's own class geometry; 0: all classes equally far apart


@dataclass(frozen=True)
class ClassText:
    """What is known of a class in words."""

    key: str  # the label as it stands in the data
    name: str
    synonyms: tuple[str, ...] = ()
    definition: str = ""

    def sentences(self, templates: Sequence[str]) -> list[str]:
        """Name and synonyms through every template; the definition once, since "an image of a malignant ..." is no
        sentence."""
        names = dict.fromkeys((self.name, *self.synonyms))  # ordered, without repeats
        spoken = [t.replace("{}", n) for n in names for t in templates]
        return [*spoken, f"{self.name}: {self.definition}"] if self.definition else spoken


def read_classes(path: str | Path) -> list[ClassText]:
    """Read the class table. UserError: missing file or column, no row, an empty or repeated class."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"class table {path} cannot be read ({e}): give a UTF-8 CSV such as\n{EXAMPLE}") from e
    if "class" not in columns:
        raise UserError(f"class table {path} has no column 'class' (it has {', '.join(columns)}): it begins\n{EXAMPLE}")
    table, seen = [], set()
    for line, row in enumerate(rows, start=2):
        key = (row["class"] or "").strip()
        if not key or key in seen:
            raise UserError(f"class table {path}, line {line}: class {key!r} is {'repeated' if key else 'empty'}")
        seen.add(key)
        synonyms = tuple(s.strip() for s in (row.get("synonyms") or "").split("|") if s.strip())
        definition = (row.get("definition") or "").strip()
        table.append(ClassText(key, (row.get("name") or "").strip() or plain(key), synonyms, definition))
    if not table:
        raise UserError(f"class table {path} has no rows: it begins\n{EXAMPLE}")
    return table


def plain(key: str) -> str:
    return key.replace("_", " ")


def select(wanted: Sequence[str], known: Sequence[str], where: str) -> list[int]:
    """Positions in `known` of the wanted classes, in their order. UserError lists all that are missing."""
    missing = [c for c in wanted if c not in known]
    if missing:
        near = {c: difflib.get_close_matches(c, known, 1, 0.5) for c in missing}
        listed = ", ".join(f"{c!r}" + (f" (nearest: {near[c][0]!r})" if near[c] else "") for c in missing)
        raise UserError(
            f"{where} lacks {len(missing)} of the data's classes: {listed}. Add a row for each to the class table"
        )
    place = {c: i for i, c in enumerate(known)}
    return [place[c] for c in wanted]


def beside(options: TextOptions, folder: Path) -> TextOptions:
    """The same, with the classes.csv of a folder of shards where no other table is named."""
    here = folder / "classes.csv"
    return replace(options, classes=str(here)) if not options.classes and here.is_file() else options


def embed_classes(
    encoder: str, classes: Sequence[ClassText], templates: Sequence[str] = TEMPLATES, pooling: str = "auto"
) -> Tensor:
    """-> [K, Dt]: the mean of a class's unit-norm sentence embeddings (prompt ensembling; Radford 2021, 3.1.4)."""
    wrong = [t for t in templates if "{}" not in t]
    if wrong or not templates:
        raise UserError(f"text.templates: {wrong or 'empty'}: every template needs {{}} where the class name goes")
    spoken = [c.sentences(templates) for c in classes]
    vectors = embed_sentences(encoder, [s for group in spoken for s in group], pooling)
    return torch.stack([part.mean(0) for part in vectors.split([len(group) for group in spoken])])


# ------------------------------------------------------------------------------------------- embeddings -> prototypes


def class_prototypes(options: TextOptions, classes: Sequence[str], width: int, seed: int = 0) -> Tensor | None:
    """What a label head starts from: [K, width] for the data's classes, or None when no text is asked for."""
    embeddings = class_embeddings(options, classes)
    return None if embeddings is None else prototypes(embeddings, width, options.shrinkage, seed)


def prototypes(embeddings: Tensor, width: int, shrinkage: float = 0.5, seed: int = 0) -> Tensor:
    """Class embeddings E [K, Dt] -> prototypes [K, width], unit norm: centre, whiten with shrinkage, map, normalise."""
    return fit_map(embeddings, width, shrinkage, seed)(embeddings)


@dataclass(frozen=True)
class TextMap:
    """Text embeddings -> prototypes: affine, then unit norm. Fitted on some classes, it places any others too."""

    mean: Tensor  # [Dt]
    weight: Tensor  # [Dt, width]
    nowhere: Tensor  # [width], for rows that have no direction

    def __call__(self, embeddings: Tensor) -> Tensor:
        """[N, Dt] -> [N, width]. Of a class that the map was not fitted on, only what lies in the span of the fitted
        classes is placed: a head that has learnt to tell K classes apart has at most K - 1 directions."""
        mapped = (embeddings.detach().double().cpu() - self.mean) @ self.weight
        lost = mapped.norm(dim=1, keepdim=True) < 1e-6
        return F.normalize(torch.where(lost, self.nowhere, mapped), dim=1).float()


def fit_map(embeddings: Tensor, width: int, shrinkage: float = 0.5, seed: int = 0) -> TextMap:
    """The map of class embeddings E [K, Dt] into a head of this width.

    Centre: sentence encoders put everything into one narrow cone; X = E - mean(E) removes what all classes share.
    Whiten: X = U diag(s) V^T, rank r < K. Direction i is scaled by s_i -> s_i / sqrt((1 - a) s_i^2 + a m), m the mean
    of s^2, a the shrinkage: the inverse root of the shrunk covariance (1 - a) C + a mean(C) I on the span of the
    classes. a = 1 keeps the encoder's geometry; a = 0 makes K independent classes a simplex, every pair at
    cosine -1 / (K - 1); between them, large shared directions no longer drown the small ones that tell classes apart.
    Map: coordinates in V go to the head's width through O [r, width], O O^T = I, so every angle survives. O is the
    polar factor of V^T G with G [Dt, width] Gaussian from `seed`: random, yet the same whatever signs the SVD chose
    and whatever order the classes came in. With r > width the strongest `width` directions stay (Eckart-Young).
    Rows without a direction (a single class, or one that equals the mean) share one random unit vector.
    """
    if width < 1 or not 0.0 <= shrinkage <= 1.0:
        raise UserError(f"prototypes: width {width} must be at least 1, text.shrinkage {shrinkage} within 0..1")
    e = embeddings.detach().double().cpu()
    mean, scale = e.mean(0), e.norm(dim=1).max().clamp_min(1e-12)
    gauss = torch.randn(e.shape[1], width, dtype=e.dtype, generator=torch.Generator().manual_seed(seed))
    _, s, vt = torch.linalg.svd((e - mean) / scale, full_matrices=False)
    keep = (s > 1e-6)[:width].nonzero().flatten()  # s descends; float32 embeddings carry no more
    rank_mean = s[s > 1e-6].square().mean() if len(keep) else s.new_zeros(())
    s, vt = s[keep], vt[keep]
    gain = ((1 - shrinkage) * s.square() + shrinkage * rank_mean).rsqrt() / scale  # [r]
    left, _, right = torch.linalg.svd(vt @ gauss, full_matrices=False)
    return TextMap(mean, (vt.T * gain) @ (left @ right), gauss[0])


def expressed(fitted: Tensor, others: Tensor) -> Tensor:
    """How much of what sets other classes apart from the fitted ones' mean lies in their span, 0 to 1: [K, Dt], [N, Dt]
    -> [N]. It is what a map fitted on the first can place of the second; the rest is lost."""
    mean = fitted.double().mean(0)
    _, s, vt = torch.linalg.svd(fitted.double() - mean, full_matrices=False)
    apart = others.double() - mean
    return (apart @ vt[s > 1e-6].T).norm(dim=1) / apart.norm(dim=1).clamp_min(1e-12)


def similarity(prototypes: Tensor) -> Tensor:
    """Cosine of every pair of rows: [K, D] -> [K, K]."""
    unit = F.normalize(prototypes.float(), dim=1)
    return unit @ unit.T


def nearest_pairs(similarity: Tensor, classes: Sequence[str], count: int = 10) -> list[tuple[str, str, float]]:
    """The most alike pairs of classes, most alike first: [(class, class, cosine)]."""
    cosines = similarity.tolist()
    pairs = [(cosines[i][j], i, j) for i in range(len(classes)) for j in range(i)]
    return [(classes[j], classes[i], cosine) for cosine, i, j in sorted(pairs, reverse=True)[:count]]


# ---------------------------------------------------------------------------------------------------------- the cache


def table_sha256(classes: Sequence[ClassText]) -> str:
    rows = [[c.key, c.name, list(c.synonyms), c.definition] for c in classes]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def save_cache(
    path: str | Path,
    embeddings: Tensor,
    classes: Sequence[ClassText],
    encoder: str,
    templates: Sequence[str],
    pooling: str = "auto",
) -> None:
    """Write `embeddings` [K, Dt] and where they came from; whole or not at all."""
    from safetensors.torch import save_file

    about = {"classes": [c.key for c in classes], "encoder": encoder, "templates": list(templates)}
    about |= {"pooling": pooling, "format": "hybridssl-text", "version": 1, "table_sha256": table_sha256(classes)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file({"embeddings": embeddings.float().contiguous().cpu()}, partial, {"hybridssl": json.dumps(about)})
    os.replace(partial, path)


def load_cache(path: str | Path, classes: Sequence[str] | None = None) -> tuple[Tensor, dict]:
    """-> (embeddings [K, Dt], about), the rows selected and ordered as `classes` asks (None: as saved)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["hybridssl"])
            embeddings = file.get_tensor("embeddings")
    except (OSError, SafetensorError, KeyError, ValueError) as e:
        remedy = "make it with: python -m hybridssl prototypes --encoder ... --classes classes.csv --out FILE"
        raise UserError(f"text embeddings {path} cannot be read ({e}): {remedy}") from e
    if about.get("format") != "hybridssl-text" or about.get("version") != 1:
        raise UserError(f"text embeddings {path} have an unknown format or a newer version: update, or make them anew")
    if classes is not None:
        embeddings = embeddings[select(classes, about["classes"], f"text embeddings {path}")]
    return embeddings, about


def class_embeddings(options: TextOptions, classes: Sequence[str]) -> Tensor | None:
    """What a run needs: [K, Dt] for the data's classes, from the cache or the encoder; None when no text is asked for.

    UserError: a class without text, or a cache that another class table, encoder or list of templates made.
    """
    if not classes:
        return None
    table = read_classes(options.classes) if options.classes else None
    if options.cache and Path(options.cache).exists():
        embeddings, about = load_cache(options.cache, classes)
        now: dict[str, Any] = {"table_sha256": table_sha256(table)} if table else {}
        if options.encoder:
            now |= {"encoder": options.encoder, "templates": list(options.templates), "pooling": options.pooling}
        about.setdefault("pooling", "auto")  # files of before it was kept
        stale = [key.removesuffix("_sha256") for key, value in now.items() if about[key] != value]
        if stale:
            raise UserError(
                f"text.cache {options.cache} was made with another {stale[0]}: delete it or name another file"
            )
        return embeddings
    if not options.encoder:
        if options.cache:
            raise UserError(f"text.cache {options.cache} does not exist: make it with python -m hybridssl prototypes")
        return None
    table = table or [ClassText(c, plain(c)) for c in classes]
    rows = select(classes, [c.key for c in table], f"class table {options.classes}")
    embeddings = _embedded(options.encoder, tuple(table), tuple(options.templates), options.pooling)
    if options.cache:
        save_cache(options.cache, embeddings, table, options.encoder, options.templates, options.pooling)
    return embeddings[rows]


@lru_cache(maxsize=1)
def _embedded(encoder: str, table: tuple[ClassText, ...], templates: tuple[str, ...], pooling: str) -> Tensor:
    """`embed_classes`, once for a run that asks twice: for its label head, and for what its report shows beside it."""
    return embed_classes(encoder, table, templates, pooling)
