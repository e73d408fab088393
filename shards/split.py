"""Splits that keep a patient on one side.

Two ways, for no way has both virtues. By hash alone, a patient's split depends on nothing but the patient, so images
that come later move no one; the shares of a class are then right only up to chance. Stratified, every class is divided
in the shares to within one patient, which depends on who else is there; an earlier index keeps its patients in place.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from hashlib import blake2b

import numpy as np

from shards.errors import DataError
from shards.format import SPLITS

Parts = list[tuple[str, float]]  # (name, share); the shares sum to 1


def parse_split(text: str) -> Parts:
    """`70/10/20` -> shares of train, val and test; `80/20` -> train and test."""
    try:
        shares = [float(part) for part in text.split("/")]
        names = {2: ("train", "test"), 3: ("train", "val", "test")}[len(shares)]
    except (ValueError, KeyError):
        raise DataError(f"--split {text}: write shares of train/val/test such as 70/10/20, or of train/test") from None
    if min(shares) < 0 or abs(sum(shares) - 100) > 1e-6:
        raise DataError(f"--split {text}: the shares sum to {sum(shares):g} where 100 is needed")
    return [(name, share / 100) for name, share in zip(names, shares, strict=True)]


def split_of(name: str, parts: Parts, seed: int = 0) -> str:
    """The split of a group by its hash alone: images added later move no one."""
    at = int.from_bytes(_hash(name, seed), "little") / 2**64
    for split, share in parts:
        if at < share:
            return split
        at -= share
    return parts[-1][0]


def stratified(
    units: Sequence[Hashable],
    labels: Sequence[tuple[str, ...]],
    parts: Parts,
    seed: int = 0,
    kept: Mapping[Hashable, str] | None = None,
) -> list[str]:
    """The split of each image, all images of a unit (patient) in one.

    A unit counts for the rarest class that it has, and each class is divided in the shares to within one unit. Units
    in `kept` stay where they are; later ones fill what is short.
    """
    kept = kept or {}
    classes: dict[Hashable, set[str]] = defaultdict(set)
    for unit, names in zip(units, labels, strict=True):
        classes[unit].update(names)
    often = Counter(name for names in classes.values() for name in names)
    strata: dict[str, list[Hashable]] = defaultdict(list)
    for unit, names in classes.items():
        strata[min(names, key=lambda name: (often[name], name), default="")].append(unit)
    found = {unit: kept[unit] for unit in classes if unit in kept}
    for members in strata.values():
        counts = Counter(found[unit] for unit in members if unit in found)
        done = counts.total()
        for unit in sorted((u for u in members if u not in found), key=lambda u: (_hash(str(u), seed), str(u))):
            done += 1
            short = [share * done - counts[split] for split, share in parts]
            found[unit] = parts[int(np.argmax(short))][0]
            counts[found[unit]] += 1
    return [found[unit] for unit in units]


def crossing(values: np.ndarray, split: np.ndarray) -> np.ndarray:
    """The values [V] (0: none, left out) that lie in more than one split; both int [N], `split` numbered as SPLITS.

    Without a split is as good as in train, for pretraining reads both.
    """
    side = np.where(split == SPLITS.index(""), SPLITS.index("train"), split)
    pairs = np.unique(np.stack([values, side]).astype(np.int64)[:, values != 0], axis=1)
    found, counts = np.unique(pairs[0], return_counts=True)
    return found[counts > 1]


def _hash(name: str, seed: int) -> bytes:
    return blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
