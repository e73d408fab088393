"""Can its probabilities be believed, and what does it promise? Judges results that exist.

  python -m finetune calibrate results/derm-s/logistic
  python -m finetune calibrate results/derm-s --positive mel bcc akiec --at 0.9 0.95
  python -m finetune calibrate results/derm-s/logistic --alpha 0.05 --by sex

Calibration error, Brier score and likelihood on the test images, before and after one temperature that is set on val;
for the --positive classes the sensitivity at a fixed specificity and the reverse, with the threshold set on val; and
prediction sets that are to hold the right class with probability 1 - alpha (conformal: LAC and APS), with the coverage
that the test images found, overall, by class and by any column of the table. Intervals resample patients or lesions.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

from finetune import calibration, conformal, judged, results, subgroups
from finetune.calibrate_page import page, sentences, show
from finetune.judged import Judged, Part
from finetune.kinds import choose
from finetune.metrics import Array, Interval, Metric
from finetune.resample import Draws, Statistic, resample
from hybridssl.errors import UserError

ERRORS = {
    "ece": calibration.ece,
    "adaptive_ece": calibration.adaptive_ece,
    "brier": calibration.brier,
    "nll": calibration.nll,
}
ROUNDING = 1e-4  # by which a sum of float32 votes may pass 1
INFLATED = ("ece", "adaptive_ece")  # a resample is never as calibrated as the data that it is drawn from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    judged.add_arguments(parser)
    add = parser.add_argument
    add("--positive", nargs="+", metavar="CLASS", help="classes that count as disease; default: those of the result")
    add("--at", nargs="+", type=float, default=[0.9, 0.95], metavar="F", help="fixed specificities and sensitivities")
    add("--alpha", type=float, default=0.1, help="share of images whose set may miss the right class (0.1)")
    subgroups.add_arguments(parser, required=False)


def run(args: argparse.Namespace) -> None:
    if not 0 < args.alpha < 1 or not all(0 < at <= 1 for at in args.at):
        raise UserError("--alpha must lie between 0 and 1, and --at above 0 and at most 1")
    found = judged.find(args.results, val=True)
    for one in found if args.by else []:
        if one.kind.multi_label:
            raise UserError(
                f"{one.result.path}: --by tells the coverage of prediction sets, and with several labels an image "
                "there are none: leave --by out"
            )
    folders = judged.places(found, "calibrate", args.out, args.overwrite)
    positives = [_checked(one, args) for one in found]
    for one, folder, positive in zip(found, folders, positives, strict=True):
        started = time.monotonic()
        parts = subgroups.of_images(one.index(args.data), one.number, args) if args.by else None
        _one(one, folder, positive, parts, args, started)


def _checked(one: Judged, args: argparse.Namespace) -> tuple[str, ...]:
    """The classes that count as disease. UserError for what would fail later."""
    if one.scores.min() < -ROUNDING or one.scores.max() > 1 + ROUNDING:
        raise UserError(f"{one.result.path}: its scores are no probabilities (0 to 1): there is nothing to calibrate")
    positive = choose(one.kind.name, one.classes, args.positive or one.kind.positive).positive
    for part in one.val if positive else []:
        ill = np.isin(part.y, [one.classes.index(c) for c in positive])
        if ill.all() or not ill.any():
            side = "with" if ill.all() else "without"
            raise UserError(f"{one.result.path}: all images of val are {side} disease: no threshold can be set on it")
    return positive


def _one(
    one: Judged, folder: Path, positive: tuple[str, ...], parts: Array | None, args: argparse.Namespace, started: float
) -> None:
    """Set everything on val, measure it on test, write it down. parts: str [N], the subgroup of each test image."""
    temperatures = [calibration.temperature(part.y, part.scores) for part in one.val]
    soften = [partial(calibration.soften, temperature=t, multi_label=one.kind.multi_label) for t in temperatures]
    scaled = np.stack([f(scores) for f, scores in zip(soften, one.scores, strict=True)])
    val = [replace(part, scores=f(part.scores)) for f, part in zip(soften, one.val, strict=True)]
    chosen: dict[str, list[float]] = {"temperature": temperatures}
    whole, further, arrays = _errors(one, scaled), {}, {}
    if positive:
        own, lines = _disease(one, scaled, val, positive, args.at)
        whole, chosen = whole | own, chosen | lines
    for name, method in {} if one.kind.multi_label else conformal.METHODS.items():
        sets, lines = _sets(one, scaled, val, method, args.alpha)
        whole, chosen = whole | _coverage(one, sets, name), chosen | {f"{name} line": lines}
        arrays[f"sets_{name}"] = sets.astype(np.uint8)
        for kind, member in _members(one, parts):
            further |= _coverage(one, sets, f"{name}, {kind}", member)
    doing = f"calibration of {one.name} ({one.result.protocol})"
    draws = resample({**whole, **further}, one.group, doing=doing)
    found = {name: draws[name].interval for name in whole} | _error_intervals(draws)
    curves = {"as it is": one.scores, "scaled": scaled}
    detail = {
        "alpha": args.alpha,
        "at": args.at if positive else [],
        "positive": positive,
        "by": args.by,
        "sets": list(arrays),
        "spread": conformal.spread(args.alpha, min(len(np.unique(part.group)) for part in one.val)),
        "members": {name: int(member.sum()) for name, member in _members(one, parts)} if arrays else {},
        "coverage": {name: asdict(draws[name].interval) for name in further},
        "reliability": {name: calibration.reliability(one.y, scores) for name, scores in curves.items()},
    }
    about = one.about(folder.name, started, notes=_notes(one, args.alpha), detail=detail)
    picked = [dict(zip(chosen, values, strict=True)) for values in zip(*chosen.values(), strict=True)]
    seeds = about["seeds"]
    choices = [{"seed": seed, **{k: round(v, 6) for k, v in p.items()}} for seed, p in zip(seeds, picked, strict=True)]
    about["selected"] = {"split": about["selected"]["split"], "by": "nll", "grid": {}, "choices": choices}
    detail["said"] = sentences(about, found)
    rows = {"y": one.y, "group": one.group, "number": one.number}
    path = results.write(folder, about, found, scores=scaled.astype(np.float32), **rows, **arrays)
    page(about, found, path).write(folder / "report.html")
    show(about, found, path)


# -- statistics: what `resample` wants, mean over seeds --------------------------------------------------------------


def _errors(one: Judged, scaled: Array) -> dict[str, Statistic]:
    def of(error: Metric, runs: Array) -> Statistic:
        return lambda weight: np.mean([error(one.y, scores, weight) for scores in runs], axis=0)

    both = {"": one.scores, "_scaled": scaled}
    return {f"{name}{mark}": of(error, runs) for name, error in ERRORS.items() for mark, runs in both.items()}


def _error_intervals(draws: dict[str, Draws]) -> dict[str, Interval]:
    """Each error before, after and what changed; `reflected` where a resample inflates, and never below 0."""
    found = {}
    for name in ERRORS:
        before, after = draws[name], draws[f"{name}_scaled"]
        for key, draw in ((name, before), (f"{name}_scaled", after), (f"{name}_change", after - before)):
            there = draw.reflected if name in INFLATED else draw.interval
            floor = -np.inf if key.endswith("_change") else 0.0
            found[key] = Interval(there.value, *(float(np.maximum(floor, end)) for end in (there.low, there.high)))
    return found


def _disease(
    one: Judged, scaled: Array, val: list[Part], positive: tuple[str, ...], at: list[float]
) -> tuple[dict[str, Statistic], dict[str, list[float]]]:
    """Sensitivity and specificity on test at thresholds of val, and those thresholds, one a seed."""
    classes = [one.classes.index(c) for c in positive]
    ill = np.isin(one.y, classes)
    statistics, thresholds = {}, {}
    for fixed, choose_line in (
        ("specificity", calibration.threshold_for_specificity),
        ("sensitivity", calibration.threshold_for_sensitivity),
    ):
        for least in at:
            name = f"{fixed}={least:g}"
            lines = [choose_line(p.scores[:, classes].sum(1), np.isin(p.y, classes), least) for p in val]
            said = np.stack([s[:, classes].sum(1) >= line for s, line in zip(scaled, lines, strict=True)])
            statistics[f"sensitivity at {name}"] = _share(said.mean(0), ill)
            statistics[f"specificity at {name}"] = _share(1 - said.mean(0), ~ill)
            thresholds[f"threshold at {name}"] = lines
    return statistics, thresholds


def _sets(
    one: Judged, scaled: Array, val: list[Part], method: conformal.Method, alpha: float
) -> tuple[Array, list[float]]:
    """bool [S, N, K]: which classes are in the set of each test image; and the line of each seed, set on val."""
    noise, lines = conformal.noise(one.number), []
    for part in val:
        fit = method(part.scores, conformal.noise(part.number))
        lines.append(conformal.quantile(conformal.right(fit, part.y), part.group, alpha))
    return np.stack([method(s, noise) <= line for s, line in zip(scaled, lines, strict=True)]), lines


def _coverage(one: Judged, sets: Array, name: str, member: Array | None = None) -> dict[str, Statistic]:
    """How often the right class is in the set, and how many classes are, for all images or the `member` ones."""
    member = np.ones(len(one.y), dtype=bool) if member is None else member
    held = sets[:, np.arange(len(one.y)), one.y].mean(0)
    size = sets.sum(2)
    _, at, count = np.unique(one.group, return_inverse=True, return_counts=True)
    return {
        f"coverage ({name})": _share(held, member),
        f"coverage, groups alike ({name})": _share(held, member / count[at]),
        f"set size ({name})": _share(size.mean(0), member),
        f"empty sets ({name})": _share((size == 0).mean(0), member),
    }


def _members(one: Judged, parts: Array | None) -> list[tuple[str, Array]]:
    """(name, bool [N]) of the images of each class, then of each subgroup."""
    classes = [(f"class {c}", one.y == k) for k, c in enumerate(one.classes) if (one.y == k).any()]
    return classes + ([] if parts is None else [(f"subgroup {s}", parts == s) for s in subgroups.names(parts)])


def _share(value: Array, among: Array) -> Statistic:
    """Mean of value [N], weighted by among [N]."""
    return lambda weight: weight @ (value * among) / (weight @ among)


def _notes(one: Judged, alpha: float) -> list[str]:
    said = []
    if one.result.about["selected"].get("grid", {}).get("class_weight") == "balanced":
        said.append(
            "it was trained with all classes weighing the same, so its probabilities are for a clinic that sees "
            "all classes equally often; one temperature does not change that"
        )
    if one.kind.multi_label:
        return [*said, "prediction sets are for one class an image: with several labels there are none here"]
    groups = min(len(np.unique(part.group)) for part in one.val)
    if groups + 1 < 1 / alpha:
        said.append(f"val has {groups} groups, too few to promise {1 - alpha:.0%}: every set holds every class")
    if any(len(np.unique(part.group)) < len(part.y) for part in one.val):
        said.append("val has several images of a group: each group counts once, and the promise is for a new group")
    said.append("val also chose hyper-parameters and temperature, so the promise is near, not exact: see the coverage")
    return said
