"""Which samples train, choose and judge: fractions of labels by whole groups, a carved val, and the leak guard."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from hybridssl.errors import UserError
from shards.index import Index

Array = np.ndarray


def label_subset(y: Array, groups: Array, fraction: float, seed: int = 0, keep_one: bool = False) -> Array:
    """bool [N]: whole groups that hold about `fraction` of the images of every class; at least one image a class.

    A pure function of (labels, groups, seed): groups are taken in the order of a hash, rarest class first, so a smaller
    fraction is (nearly) part of a larger one. keep_one: of no class the last group is taken, as a carved val must not.
    """
    names, member = np.unique(groups, return_inverse=True)
    order = np.argsort([blake2b(f"{seed}:{name}".encode(), digest_size=8).digest() for name in names.tolist()])
    table = np.zeros((len(names), int(y.max()) + 1), dtype=np.int64)  # images of each class in each group
    np.add.at(table, (member, y), 1)
    total, taken = table.sum(0), np.zeros(len(names), dtype=bool)
    left = (table > 0).sum(0)  # groups of each class that are not taken
    for c in sorted(np.flatnonzero(total).tolist(), key=lambda c: int(total[c])):
        target, have = max(1, round(fraction * int(total[c]))), int(table[taken, c].sum())
        for g in order[(table[order, c] > 0) & ~taken[order]]:
            if have >= target:
                break
            holds = table[g] > 0
            if not (keep_one and (left[holds] == 1).any()):
                taken[g], have, left = True, have + int(table[g, c]), left - holds
    return taken[member]


@dataclass(frozen=True)
class Leaks:
    """What should be nil. pretraining is None where the backbone did not record what it read."""

    pretraining: int | None  # val and test images that the backbone read in pretraining
    groups: int  # groups (patients, lesions) in more than one split, or judged though pretraining read images of them
    images: int  # identical image files in more than one split
    allowed: bool = False

    @property
    def any(self) -> bool:
        return bool(self.pretraining or self.groups or self.images)

    def sentences(self) -> list[str]:
        said = [
            (self.pretraining, "val or test images were read in the backbone's own pretraining"),
            (self.groups, "groups (patients, lesions) are in more than one split, or were read in pretraining"),
            (self.images, "identical images are in more than one split"),
        ]
        return [f"{count:,} {what}" for count, what in said if count]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_leaks(index: Index, splits: dict[str, Array], pretrained_on: Array | None) -> Leaks:
    """Count leaks between `splits` (name -> sample numbers), and with what else of the index has taught the backbone.

    The splits of an evaluation hold what has a label or a mask, but pretraining reads the rest as well, and so learns a
    patient by images that no split shows. All of train therefore counts as train, and so does what pretraining read: by
    the digests in `pretrained_on`, or, without such a record, all that is in no split.
    """
    digest, group, split = (index.column(name) for name in ("digest", "group", "split"))
    judged = np.concatenate([numbers for name, numbers in splits.items() if name != "train"])
    read = split == _code(index, "") if pretrained_on is None else np.isin(digest, pretrained_on)
    taught = np.setdiff1d(np.flatnonzero(read | (split == _code(index, "train"))), judged)

    def shared(column: Array) -> int:
        values = [np.unique(column[numbers]) for numbers in ({**splits, "train": taught}).values()]
        names, counts = np.unique(np.concatenate(values), return_counts=True)
        return int((counts[names != 0] > 1).sum())

    return Leaks(None if pretrained_on is None else int(read[judged].sum()), shared(group), shared(digest))


def _code(index: Index, split: str) -> int:
    """What the index's column `split` says of it; -1 where no image is in it."""
    return index.splits.index(split) if split in index.splits else -1


def guard(leaks: Leaks, allow: bool) -> Leaks:
    """UserError with the counts when there is a leak, unless allowed: then the result says so in red."""
    if leaks.any and not allow:
        raise UserError(
            f"{'; '.join(leaks.sentences())}: the figures would be too good. Evaluate on other images, mend the split "
            "column (one split to all images of a patient, also to those without a label), or go on with --allow-leak, "
            "which marks the result"
        )
    return Leaks(leaks.pretraining, leaks.groups, leaks.images, allowed=leaks.any and allow)
