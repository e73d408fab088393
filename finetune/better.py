"""Which way of a figure is better, by its name: the one table of that, for whoever puts the best first or in bold.

A figure that is not here has no best. A gap or a drop says nothing by itself, for a backbone that is always wrong has
none; a change, a coverage and the size of prediction sets are read beside others; distances between features (`drift`,
`select`) have no scale that two backbones share.
"""

from __future__ import annotations

import math
import re

from finetune.metrics import Interval

HIGHER = (
    *("accuracy", "macro_f1", "macro_auroc", "average_precision", "quadratic_kappa"),
    *("sensitivity", "specificity", "disease_auroc", "harmonic_mean"),
    *("precision", "recall", "hit", "mAP", "purity", "neighbour_purity"),
    *("in_domain", "out_of_domain", "icc", r"\w+ icc_2_1", "(?:iou|dice)(?:_.+)?"),
)
LOWER = ("ece", "adaptive_ece", "brier", "nll")
NAME = re.compile(  # with what a verb adds to it: macro_auroc@5, accuracy in women, iou (a box), ece_scaled
    rf"(?:balanced_)?(?:(?P<higher>{'|'.join(HIGHER)})|{'|'.join(LOWER)})"
    r"(?:_(?:worst|seen|unseen|among_unseen|scaled))?(?:@.+| in .+| \(.+\))?"
)


def direction(name: str) -> int:
    """1: the higher the better, -1: the lower, 0: neither by itself."""
    found = NAME.fullmatch(name)
    return 0 if found is None else 1 if found["higher"] else -1


def rank(name: str, figure: Interval | None) -> float:
    """The larger, the better; -inf for what is not there or has no best."""
    way = direction(name)
    return -math.inf if figure is None or not way or math.isnan(figure.value) else way * figure.value
