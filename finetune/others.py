"""Nearest neighbours of other patients: an image of the same patient or lesion would be too easy a catch."""

from __future__ import annotations

import faiss
import numpy as np

from hybridssl.probe import unit

Array = np.ndarray


def nearest(x: Array, group: Array, asked: Array, asked_group: Array, k: int) -> tuple[Array, Array]:
    """The k rows of `x` most alike to every row of `asked` and of another group, by an exact search.

    [N, D], [N], [M, D], [M] -> cosine [M, k] and row int64 [M, k], the most alike first. k is cut to N; where too few
    rows are of another group, rows of the same come last.
    """
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(unit(x))
    names, size = np.unique(group, return_counts=True)
    own = size[np.isin(names, asked_group)]  # so many of the first neighbours may be of the same group
    many = min(len(x), k + int(own.max(initial=0)))
    found = []
    block = max(1, 2**24 // many)
    for start in range(0, len(asked), block):
        rows = slice(start, start + block)
        cosine, at = index.search(unit(asked[rows]), many)
        same = group[at] == asked_group[rows, None]
        order = np.argsort(same, axis=1, kind="stable")[:, :k]
        found.append([np.take_along_axis(values, order, axis=1) for values in (cosine, at)])
    cosine, at = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return cosine, at
