"""Which images a backbone finds alike, for `python -m shards audit --backbone`: it proposes pairs, pixels decide."""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np

from finetune.backbones import load
from finetune.features import default_cache, extract
from hybridssl.errors import UserError
from shards.errors import DataError
from shards.index import Index

NEAREST = 5  # proposals an image


def suggester(spec: str, device: str = "cpu") -> Callable[[Index, Index], np.ndarray]:
    """suggest(index, other) -> int64 [M, 2]: each sample of `index` with its NEAREST of `other` by the cosine of CLS
    features; other is index: each pair once, and none with itself. DataError when the backbone cannot be had."""
    try:
        encoder = load(spec, device=device)
    except UserError as error:  # the door of `shards` knows one kind of error
        raise DataError(str(error)) from None

    def features(index: Index) -> tuple[np.ndarray, np.ndarray]:
        found = extract(encoder, index, np.arange(len(index)), cache=default_cache())
        x = np.ascontiguousarray(found.x["cls"], dtype=np.float32)
        faiss.normalize_L2(x)
        return x, found.numbers

    def suggest(index: Index, other: Index) -> np.ndarray:
        itself = index is other
        x, rows = features(index)
        y, columns = (x, rows) if itself else features(other)
        search = faiss.IndexFlatIP(y.shape[1])
        search.add(y)  # type: ignore[call-arg]
        near = search.search(x, min(NEAREST + itself, len(y)))[1]  # type: ignore[call-arg]
        pairs = np.stack([np.repeat(rows, near.shape[1]), columns[near.ravel()]], axis=1)
        return np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1), axis=0) if itself else pairs

    return suggest
