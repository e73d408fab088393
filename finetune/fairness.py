"""Metrics of subgroups on one set of resamples: each by itself, against the rest, and the gap between best and worst.

A subgroup is only ranked by a metric that it allows: a mean over classes of which it has no image would compare another
question. The gap is between the two subgroups that are best and worst on the data as they are, and its interval follows
those two through the resamples: the range over subgroups taken anew in every resample is never 0, so its interval would
show a gap where there is none. Naming them by the same images still leans the gap to the large side, so whether a
subgroup differs is decided by its test against the rest, with Holm's correction for the number of subgroups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.judged import Judged
from finetune.kinds import Kind
from finetune.metrics import Array, Interval
from finetune.resample import Draws, Statistic, enough, few_groups, holm, resample
from finetune.subgroups import UNKNOWN, names
from hybridssl.errors import UserError

ALPHA = 0.05
DISEASE = ("sensitivity", "specificity", "disease_auroc")
WANT_NO_CLASS = ("accuracy",)


@dataclass(frozen=True)
class Standing:
    """One subgroup by one metric."""

    value: Interval
    against_rest: Interval  # NaN where the rest does not allow the metric
    p: float  # of the difference from the rest, adjusted by Holm over the subgroups

    @property
    def verdict(self) -> str:
        if self.p > ALPHA or np.isnan(self.against_rest.value):
            return "not shown to differ"
        return "lower than the rest" if self.against_rest.value < 0 else "higher than the rest"


@dataclass(frozen=True)
class Gap:
    """Best minus worst subgroup by one metric."""

    best: str
    worst: str
    difference: Interval


@dataclass(frozen=True)
class Fairness:
    sizes: dict[str, tuple[int, int]]  # subgroup -> images, groups
    unranked: dict[str, dict[str, str]]  # metric -> subgroup -> why
    overall: dict[str, Interval]  # metric -> on all test images
    standing: dict[str, dict[str, Standing]]  # metric -> ranked subgroup -> its standing
    gaps: dict[str, Gap]  # metric -> gap, where at least two subgroups are ranked

    @property
    def equalised_odds(self) -> tuple[str, Gap] | None:
        """The larger of the gaps in sensitivity and specificity (Hardt et al. 2016), with the one that it is."""
        both = [(name, self.gaps[name]) for name in ("sensitivity", "specificity") if name in self.gaps]
        return max(both, key=lambda pair: pair[1].difference.value) if len(both) == 2 else None

    def as_dict(self) -> dict[str, Any]:
        """For results.json: what is not in its metrics."""
        interval = lambda m: {"value": m.value, "low": m.low, "high": m.high}  # noqa: E731
        return {
            "subgroups": {name: {"images": i, "groups": g} for name, (i, g) in self.sizes.items()},
            "unranked": self.unranked,
            "standing": {
                metric: {
                    name: {
                        **interval(s.value),
                        "against_rest": interval(s.against_rest),
                        "p_holm": s.p,
                        "verdict": s.verdict,
                    }
                    for name, s in rows.items()
                }
                for metric, rows in self.standing.items()
            },
            "gaps": {m: {"best": g.best, "worst": g.worst, **interval(g.difference)} for m, g in self.gaps.items()},
        }


def judge(one: Judged, kind: Kind, values: Array, least: int, headline: str, doing: str = "") -> Fairness:
    """values: str [N], the subgroup of each test image; least: images that one needs to be ranked, and these of enough
    patients or lesions (`resample.few_groups`). UserError when fewer than two can be ranked by `headline`."""
    everyone = names(values)
    rows = {name: values == name for name in everyone}
    sizes = {name: (int(rows[name].sum()), len(np.unique(one.group[rows[name]]))) for name in everyone}
    unranked = {m: _unranked(one, kind, m, rows, least) for m in kind.metrics}
    ranked = {m: [name for name in everyone if name not in unranked[m]] for m in kind.metrics}
    if len(ranked[headline]) < 2:
        why = "; ".join(f"{name}: {reason}" for name, reason in unranked[headline].items())
        raise UserError(
            f"{one.result.path}: fewer than two subgroups can be ranked by {headline} ({why}): --merge, wider --bins, "
            "a --metric that needs fewer classes (accuracy; disease_auroc with --positive), or a smaller --least"
        )
    rest = {name: ~rows[name] & (values != UNKNOWN) for name in everyone}
    statistics: dict[str, Statistic] = {}
    for metric in kind.metrics:
        statistics[f"{metric} of all"] = _inside(one, kind, metric, np.ones(len(values), dtype=bool))
        for name in ranked[metric]:
            statistics[f"{metric} in {name}"] = _inside(one, kind, metric, rows[name])
            if not _lacking(one, kind, metric, rest[name]):
                statistics[f"{metric} outside {name}"] = _inside(one, kind, metric, rest[name])
    draws = resample(statistics, one.group, enough(max(map(len, ranked.values()))), doing=doing)
    overall = {m: draws[f"{m} of all"].interval for m in kind.metrics}
    standing = {m: _standing(draws, m, ranked[m], sizes) for m in kind.metrics if ranked[m]}
    gaps = {m: _gap(draws, m, ranked[m]) for m in kind.metrics if len(ranked[m]) > 1}
    return Fairness(sizes, unranked, overall, standing, gaps)


def _inside(one: Judged, kind: Kind, metric: str, rows: Array) -> Statistic:
    """The metric on some images, mean over seeds."""
    y, scores, function = one.y[rows], one.scores[:, rows], kind.metrics[metric]
    return lambda weight: np.mean([function(y, run, weight[:, rows]) for run in scores], axis=0)


def _standing(
    draws: dict[str, Draws], metric: str, ranked: list[str], sizes: dict[str, tuple[int, int]]
) -> dict[str, Standing]:
    nothing = Draws(np.nan, np.array([]))
    against = {
        name: draws[f"{metric} in {name}"] - draws[other] if (other := f"{metric} outside {name}") in draws else nothing
        for name in ranked
    }
    if len(set(sizes) - {UNKNOWN}) == 2:  # each is the other's rest: one test, seen from two sides
        adjusted = [d.p for d in against.values()]
    else:
        adjusted = holm([d.p for d in against.values()])
    return {
        name: Standing(draws[f"{metric} in {name}"].interval, d.interval, p)
        for (name, d), p in zip(against.items(), adjusted, strict=True)
    }


def _gap(draws: dict[str, Draws], metric: str, ranked: list[str]) -> Gap:
    worst, *_, best = sorted(ranked, key=lambda name: draws[f"{metric} in {name}"].value)
    return Gap(best, worst, (draws[f"{metric} in {best}"] - draws[f"{metric} in {worst}"]).interval)


def _unranked(one: Judged, kind: Kind, metric: str, rows: dict[str, Array], least: int) -> dict[str, str]:
    """subgroup -> why the metric does not rank it."""
    found = {}
    for name, own in rows.items():
        lacking = _lacking(one, kind, metric, own)
        if name == UNKNOWN:
            found[name] = "the column says nothing"
        elif own.sum() < least:
            found[name] = f"{own.sum():,} images, fewer than {least}"
        elif few := few_groups(one.group, own, least):
            found[name] = few
        elif lacking:
            found[name] = f"no image of {', '.join(lacking)}"
    return found


def _lacking(one: Judged, kind: Kind, metric: str, rows: Array) -> list[str]:
    """What the metric needs, the test set has, and these images have not."""
    if metric in WANT_NO_CLASS:
        return []
    if metric in DISEASE:
        ill = np.isin(one.y, [one.classes.index(c) for c in kind.positive])
        unused = {"sensitivity": "no disease", "specificity": "disease"}.get(metric)
        sides = {"disease": ill, "no disease": ~ill}
        return [name for name, side in sides.items() if name != unused and not side[rows].any()]
    has = one.y.astype(bool) if kind.multi_label else one.y[:, None] == np.arange(len(one.classes))
    return [c for k, c in enumerate(one.classes) if has[:, k].any() and not has[rows, k].any()]
