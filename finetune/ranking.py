"""Ranked retrieval: the order of a gallery for each query, and what information retrieval measures on it.

Shapes: Q queries, G gallery images, D features. A gallery image of the query's own group (patient, lesion) takes no
part: it is left out of the ranking, of the relevant images and of their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hybridssl.probe import neighbours

Array = np.ndarray
ROOM = 2**24  # entries of a ranked block: 16 M ranks and cosines are 200 MB


@dataclass(frozen=True)
class Ranked:
    """One row a query."""

    measures: dict[str, Array]  # name -> float64 [Q]
    nearest: Array  # int64 [Q, shown]: gallery positions, nearest first; -1 where the gallery has no more
    cosine: Array  # float32 [Q, shown]; NaN there


def rank(
    queries: Array,
    gallery: Array,
    relevant: Callable[[Array, Array], Array],
    query_group: Array,
    gallery_group: Array,
    ks: Sequence[int],
    step: Callable[[int], None] = lambda count: None,
) -> Ranked:
    """Rank the whole gallery [G, D] by cosine for every query [Q, D], and measure.

    relevant(query rows [q], gallery rows [q, G]) -> bool [q, G]. step is told how many queries were done.
    """
    size = max(1, ROOM // len(gallery))
    parts: list[tuple[dict[str, Array], Array, Array]] = []
    for start in range(0, len(queries), size):
        rows = np.arange(start, min(start + size, len(queries)))
        cosine, order = neighbours(gallery, queries[rows], len(gallery))
        own = gallery_group[order] == query_group[rows, None]
        back = np.argsort(own, axis=1, kind="stable")  # the query's own group to the end, all else in its order
        order, cosine = np.take_along_axis(order, back, 1), np.take_along_axis(cosine, back, 1)
        there = np.arange(len(gallery)) < (~own).sum(1, keepdims=True)
        hits = relevant(rows, order) & there
        nearest, likeness = np.full((len(rows), max(ks)), -1), np.full((len(rows), max(ks)), np.nan, np.float32)
        shown = np.s_[:, : min(max(ks), len(gallery))]
        nearest[shown], likeness[shown] = np.where(there, order, -1)[shown], np.where(there, cosine, np.nan)[shown]
        parts.append((measure(hits, ks), nearest, likeness))
        step(len(rows))
    measures = {name: np.concatenate([part[0][name] for part in parts]) for name in parts[0][0]}
    return Ranked(measures, np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts]))


def measure(hits: Array, ks: Sequence[int]) -> dict[str, Array]:
    """Measures of rankings: bool [Q, G], is the image at each rank relevant -> {name: float64 [Q]}.

    precision@k: share of the first k that is relevant; recall@k: share of the relevant that is among the first k;
    hit@k: is any of the first k relevant; average_precision: mean of the precision at the rank of each relevant image
    (Manning, Raghavan and Schuetze 2008, section 8.4). Where nothing is relevant, all are 0: nothing right was found.
    """
    found = np.cumsum(hits, axis=1)
    total, ranks = found[:, -1], np.arange(1, hits.shape[1] + 1)
    out = {"average_precision": np.where(hits, found / ranks, 0).sum(1) / np.maximum(total, 1)}
    for k in ks:
        at = found[:, min(k, hits.shape[1]) - 1]
        out |= {f"precision@{k}": at / k, f"recall@{k}": at / np.maximum(total, 1), f"hit@{k}": (at > 0).astype(float)}
    return out
