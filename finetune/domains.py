"""Images of several hospitals in one pool, and what a head loses where it was not taught. No backbone and no file here.

Every gap is paired: two heads on the same test images and the same classes, so what differs is where the heads were
taught, not how hard a hospital's cases are. Classes that one of the two was hardly taught, or that the images hardly
show, are left out of that pair: that a hospital has no vascular lesions is no shift of its images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from finetune.kinds import Kind
from finetune.resample import Draws, Statistic, few_groups, resample

Array = np.ndarray
CLASS_IMAGES = 5  # images of a class, in training of both heads and among the test images, below which it is not judged


@dataclass(frozen=True)
class Pool:
    """Rows of all domains together."""

    x: dict[str, Array]  # kind -> float32 [N, D]
    y: Array  # int64 [N], or uint8 [N, K] for several labels an image
    group: Array  # int64 [N]
    number: Array  # int64 [N]: which sample of its own index
    domain: Array  # str [N]; "" where it is not known
    test: Array  # rows
    split: Callable[[int], tuple[Array, Array]]  # seed -> rows to train on, rows to choose on
    classes: tuple[str, ...]
    kind: Kind

    def counts(self, rows: Array) -> Array:
        """int64 [K]: images of each class among the rows."""
        y = self.y[rows]
        return y.sum(0, dtype=np.int64) if self.kind.multi_label else np.bincount(y, minlength=len(self.classes))

    def of(self, rows: Array, *domains: str) -> Array:
        """Those of the rows that are of these domains."""
        return rows[np.isin(self.domain[rows], domains)]

    def parts(self, seed: int, *domains: str) -> tuple[Array, Array]:
        """Rows of these domains to train on, and to choose on."""
        train, val = self.split(seed)
        return self.of(train, *domains), self.of(val, *domains)


def eligible(pool: Pool, seeds: list[int], images: int, classes: int) -> tuple[list[str], dict[str, str]]:
    """Domains that are judged, and why the others are not: {domain: reason}. The largest first.

    images: that a domain needs in train and in test, these of enough patients or lesions (`resample.few_groups`);
    classes: with CLASS_IMAGES of each.
    """
    kept, skipped = [], {}
    names, sizes = np.unique(pool.domain, return_counts=True)
    for name in names[np.argsort(-sizes, kind="stable")].tolist():
        splits = [pool.parts(seed, name) for seed in seeds]
        trains = [train for train, _ in splits]
        train, val = min(trains, key=len), min((v for _, v in splits), key=len)
        test = pool.of(pool.test, name)
        fewest = np.min([pool.counts(rows) for rows in (*trains, test)], axis=0)  # each seed drew labels of its own
        lasting = int((fewest >= CLASS_IMAGES).sum())
        if not name:
            skipped["(unknown)"] = f"{int((pool.domain == '').sum()):,} images name no domain"
        elif len(train) < images or len(test) < images:
            skipped[name] = f"{len(train):,} train and {len(test):,} test images, fewer than {images}"
        elif few := few_groups(pool.group[pool.test], pool.domain[pool.test] == name, images):
            skipped[name] = f"test has {few}"
        elif lasting < classes:
            enough = f"{lasting} classes with {CLASS_IMAGES} train and {CLASS_IMAGES} test images"
            skipped[name] = f"{enough}, fewer than {classes}"
        elif not len(val):
            skipped[name] = "no val image to choose on"
        else:
            kept.append(name)
    return kept, skipped


Head = tuple[str, ...]  # a head by the domains that taught it


@dataclass(frozen=True)
class Pair:
    """What is compared on the test images of `there`: the head `home`, which was taught there, against `away`."""

    there: str
    home: Head
    away: Head


@dataclass(frozen=True)
class Gap:
    """A pair's figures, all on the same resampled groups."""

    home: Draws
    away: Draws
    classes: list[str]  # among which both were judged
    images: int

    @property
    def gap(self) -> Draws:
        return self.home - self.away


def shared(pool: Pool, there: str, taught: list[Array]) -> Array:
    """int64, ascending: the classes that every one of `taught` (training rows) and the test images of `there` show."""
    seen = [pool.counts(rows) for rows in (*taught, pool.of(pool.test, there))]
    return np.flatnonzero(np.min(seen, axis=0) >= CLASS_IMAGES)


def figure(pool: Pool, there: str, scores: Array, classes: Array) -> Statistic:
    """The metric that chooses, on the test images of one domain and among `classes` alone, as a function of weights of
    all test images [R, N_test] -> [R]. scores: [S, N_test, K] of one head; the figure is the mean over seeds."""
    metric, y = pool.kind.metrics[pool.kind.select_by], pool.y[pool.test]
    here = pool.domain[pool.test] == there
    if pool.kind.multi_label:
        rows = np.flatnonzero(here)
        target, runs = y[rows][:, classes], scores[:, rows][:, :, classes]
    else:  # one class an image: a choice among `classes`, so their scores sum to 1 again
        rows = np.flatnonzero(here & np.isin(y, classes))
        target, runs = np.searchsorted(classes, y[rows]), scores[:, rows][:, :, classes]
        runs = runs / np.maximum(runs.sum(2, keepdims=True), np.finfo(float).tiny)

    def statistic(weight: Array) -> Array:
        return np.mean([metric(target, run, weight[:, rows]) for run in runs], axis=0)

    return statistic


def judge(pool: Pool, pairs: list[Pair], scores: dict[Head, Array], taught: dict[Head, list[Array]]) -> dict[Pair, Gap]:
    """Every pair that has two classes in common. scores: [S, N_test, K] of all test images; taught: train rows a seed.

    All pairs are on the same resamples of all test images, so the mean of several gaps has an interval too.
    """
    statistics: dict[str, Statistic] = {}
    common: dict[Pair, Array] = {}
    for pair in pairs:
        classes = shared(pool, pair.there, [*taught[pair.home], *taught[pair.away]])
        if len(classes) >= 2:
            common[pair] = classes
            statistics[f"home {pair}"] = figure(pool, pair.there, scores[pair.home], classes)
            statistics[f"away {pair}"] = figure(pool, pair.there, scores[pair.away], classes)
    draws = resample(statistics, pool.group[pool.test], doing="resampling patients") if statistics else {}
    found = {}
    for pair, classes in common.items():
        y = pool.y[pool.of(pool.test, pair.there)]
        images = len(y) if pool.kind.multi_label else int(np.isin(y, classes).sum())
        names = [pool.classes[k] for k in classes]
        found[pair] = Gap(draws[f"home {pair}"], draws[f"away {pair}"], names, images)
    return found
