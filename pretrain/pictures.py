"""What the pictures of a report show: which samples, their features, a map and neighbours. Arrays in, arrays out.

The samples come from a shard index; every choice is a function of the index and a seed, so that the report of a run
is the same each time and two runs can be compared picture by picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from hybridssl.backbone import Backbone
from hybridssl.probe import neighbours, unit
from hybridssl.types import Tokens
from hybridssl.views import normalise, resize_for_eval
from shards.errors import DataError
from shards.format import decode
from shards.index import Index

Array = np.ndarray


@dataclass(frozen=True)
class Lens:
    """A backbone with what its input needs."""

    backbone: Backbone
    size: int
    mean: Sequence[float]
    std: Sequence[float]

    @torch.inference_mode()
    def __call__(self, images: Array) -> Tokens:
        """images: uint8 [N, C, H, W] -> Tokens in float32 on the CPU."""
        device = next(self.backbone.parameters()).device
        parts = []
        for start in range(0, len(images), 32):
            pixels = torch.from_numpy(images[start : start + 32]).to(device)
            tokens = self.backbone(normalise(pixels, self.mean, self.std))
            parts.append(Tokens(*(t.float().cpu() for t in (tokens.cls, tokens.registers, tokens.patches))))
        return Tokens(*(torch.cat(ts) for ts in zip(*((p.cls, p.registers, p.patches) for p in parts), strict=True)))


@dataclass(frozen=True)
class Gallery:
    """Samples that were read and embedded, in the order of the index."""

    numbers: Array  # int64 [N], sample numbers
    features: Array  # float32 [N, D], unit length
    fresh: Array  # the same of the backbone before training
    classes: list[str | None]  # first label; None: unlabelled
    sources: list[str | None]
    groups: Array  # int64 [N], 0: none

    def __len__(self) -> int:
        return len(self.numbers)


def choose(index: Index, selected: Array, most: int, seed: int = 0) -> Array:
    """At most `most` of the sample numbers `selected`, sorted: classes (and the unlabelled) in turn, so that rare ones
    are there, at random inside each."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(selected)
    labels = index.column("label")[shuffled]
    turn = np.zeros(len(shuffled), dtype=np.int64)  # the how-manieth of its class each one is
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:most]])


def read(index: Index, numbers: Array, size: int) -> tuple[Array, Array]:
    """(uint8 [N, C, size, size], the numbers that could be decoded)."""
    images, good = [], []
    for number in numbers:
        try:
            image = decode(index.read(int(number)).image, at_least=size, channels=index.channels)
        except DataError:
            continue  # the stream has put it into quarantine.jsonl; the report shows what can be shown
        images.append(resize_for_eval(image, size))
        good.append(number)
    empty = np.zeros((0, index.channels, size, size), dtype=np.uint8)
    return (np.stack(images) if images else empty), np.asarray(good, dtype=np.int64)


def gather(index: Index, numbers: Array, lens: Lens, fresh: Lens) -> Gallery:
    """Read, decode and embed, by a trained and a fresh backbone. Samples that do not decode are left out."""
    features = [[np.zeros((0, lens.backbone.dim), dtype=np.float32)] for _ in range(2)]
    good = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(numbers), 256):  # bounds the memory that pixels take
        images, some = read(index, numbers[start : start + 256], lens.size)
        if len(some):
            for each, rows in zip((lens, fresh), features, strict=True):
                rows.append(each(images).cls.numpy())
            good.append(some)
    kept = np.concatenate(good)
    columns = {name: index.column(name)[kept] for name in ("label", "source", "group")}
    return Gallery(
        numbers=kept,
        features=unit(np.concatenate(features[0])),
        fresh=unit(np.concatenate(features[1])),
        classes=[index.classes[i] if i >= 0 else None for i in columns["label"]],
        sources=[index.sources[i] if i >= 0 else None for i in columns["source"]],
        groups=columns["group"],
    )


def flat_map(features: Array, seed: int = 0) -> Array:
    """t-SNE of the features, [N, D] -> [N, 2]. Raises ValueError for fewer than 5 rows."""
    if len(features) < 5:
        raise ValueError("a map needs at least 5 images")
    perplexity = min(30.0, (len(features) - 1) / 3)
    method = TSNE(2, perplexity=perplexity, init="random", metric="cosine", max_iter=500, random_state=seed)
    with threadpool_limits(1):  # a few seconds on one core; on busy ones its threads wait for each other for minutes
        return method.fit_transform(features)


def spread_over_classes(gallery: Gallery, most: int) -> Array:
    """Rows of the gallery to show: one of each of `most` classes at even distance in the list of classes, its most
    typical image (the nearest to the mean of its class). Without labels: rows at even distance."""
    names = sorted({c for c in gallery.classes if c is not None})
    if not names:
        return np.unique(np.linspace(0, len(gallery) - 1, min(most, len(gallery))).round().astype(int))
    names = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, most).round().astype(int))]
    rows = []
    for name in names:
        own = np.array([i for i, c in enumerate(gallery.classes) if c == name])
        rows.append(own[(gallery.features[own] @ gallery.features[own].mean(axis=0)).argmax()])
    return np.array(rows)


def nearest(features: Array, groups: Array, rows: Array, k: int = 6) -> list[list[tuple[int, float]]]:
    """The k most alike rows of each of `rows`, as (row, cosine), of other patients or lesions: the same group would be
    too easy a catch. features: unit rows [N, D]; groups: [N], 0 is none."""
    cosine, index = neighbours(features, features[rows], len(features))
    found = []
    for row, near, values in zip(rows, index, cosine, strict=True):
        group = groups[row]
        other = [(int(i), float(c)) for i, c in zip(near, values, strict=True) if i != row]
        found.append([(i, c) for i, c in other if not group or groups[i] != group][:k])
    return found
