"""Have the images changed since the backbone was trained, and is it time to train it again?

Compares a new index (last month's images, another hospital) with the index that the backbone was trained on, in the
backbone's own feature space and without any label: as a whole, source by source, and month by month (--time COLUMN).
Each comparison is a kernel two-sample test whose threshold comes from halves of the reference, so that of 20 sets
without any change about one raises an alarm, however many sources and months are looked at. The images that lie
farthest from all that the backbone has seen are shown: often they are what changed (another camera, rulers, hair).

  python -m finetune drift --backbone models/derm-s --data data/derm --new data/derm-june --out results/drift-june
  python -m finetune drift --backbone models/derm-s --data data/derm --new data/derm-2026 --time date --out results/2026

A drift of the images is not yet a loss of accuracy, and accuracy can be lost without it (a new disease mix among alike
images). Where there is an alarm, have some of the new images labelled (`select`) and evaluate on them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from rich.table import Table

from finetune import drift_page, labelfree, results, shift
from finetune.columns import meta_column
from finetune.encoder import Encoder
from finetune.features import Features
from finetune.metrics import Interval, bootstrap
from finetune.resample import enough, holm
from finetune.shift import Comparison
from hybridssl.errors import UserError
from shards.address import public
from shards.index import Index
from shards.terminal import Terminal

Array = np.ndarray
LEAST = 20  # groups, below which a comparison says nothing
PERIODS = 8  # when --time is a number such as an age
DUE_AUROC, DUE_FAR = 0.75, 0.15  # how large a shift must be at least for a new training; a judgement, not a theorem
OUT = 95.0  # percentile of the reference's own distances beyond which an image is far out: 5 % are, without drift
NOT_SHOWN = (
    "The tests see what the backbone sees: a change that leaves its features alone goes unnoticed.",
    "Not shown: a loss of accuracy. A drift of the images is none, and accuracy can be lost without it, when other "
    "diseases look alike. Label some of the new images (python -m finetune select) and evaluate on them before and "
    "after a new training.",
)


@dataclass(frozen=True)
class Line:
    """One comparison of a part of the new images."""

    kind: str  # all | source | time | control
    name: str
    images: int
    found: Comparison
    far: Interval  # share of its images that are far out
    p: float  # corrected for the number of comparisons

    @property
    def alarm(self) -> bool:
        return self.p <= shift.RATE

    @property
    def large(self) -> bool:
        """Is the whole interval of one of the two measures of size beyond what calls for a new training?"""
        return self.found.auroc.low >= DUE_AUROC or self.far.low >= DUE_FAR


def add_arguments(parser: argparse.ArgumentParser) -> None:
    labelfree.add_arguments(parser, "the index that the backbone was trained on: the reference")
    parser.add_argument("--new", required=True, type=Path, metavar="DIR", help="the index of the new images")
    parser.add_argument("--time", metavar="COLUMN", help="column of --new with a date, a month or a number")


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    old, new = Index.open(args.data), Index.open(args.new)
    encoder = labelfree.open_encoder(args)
    numbers, held_out, notes = reference_of(old, encoder)
    fresh = np.flatnonzero(~np.isin(new.column("digest"), old.column("digest")))
    if len(fresh) < len(new):
        notes.append(f"{len(new) - len(fresh):,} of the new images are in the reference index too and are left out")
    if not len(fresh):
        raise UserError(f"all images of {new} are in {old} already: there is nothing new to compare")
    periods = periods_of(meta_column(new, fresh, args.time)) if args.time else None
    identity = {"protocol": "drift", "backbone": encoder.about()}
    data = {"sha256": new.sha256, "labels": 0.0, "source": None}
    results.check_room(args.out / "drift", identity | {"data": data}, args.overwrite)
    reference = labelfree.features_of(args, encoder, old, numbers)
    asked = labelfree.features_of(args, encoder, new, fresh)
    control = labelfree.features_of(args, encoder, old, held_out) if len(held_out) else None
    if periods is not None:
        periods = periods[np.isin(fresh, asked.numbers)]
    for where, part, least in ((old, reference, 2 * LEAST), (new, asked, LEAST)):
        if (groups := len(np.unique(part.group))) < least:
            raise UserError(f"{where} has {groups} patients, lesions or single images to compare; {least} are needed")
    own, _ = shift.distances(reference.x["cls"], reference.group, reference.x["cls"], reference.group)
    distance, nearest = shift.distances(reference.x["cls"], reference.group, asked.x["cls"], asked.group)
    percentile = shift.percentile(own, distance)
    lines, small = compare_parts(reference, asked, periods, percentile, args.seed)
    if small:
        few = f"fewer than {LEAST} patients, lesions or single images"
        notes.append(f"not compared by themselves, as they have {few}: {', '.join(small)}")
    checked = []
    if control is not None and len(np.unique(control.group)) >= LEAST:
        checked.append(control_line(reference, control, own, args.seed))
    due, words = verdict(lines, checked)
    far = farthest(distance, asked.group)
    about = labelfree.about("drift", encoder, new, args.new, {"new": asked})
    about["reference"] = {"index": public(str(args.data)), "sha256": old.sha256, "images": len(reference)}
    about["selected"] = {"split": "none: nothing is chosen", "by": "", "grid": {}, "choices": [{"seed": args.seed}]}
    about |= {"task": None, "seeds": [args.seed], "cost": labelfree.cost(started), "notes": notes}
    about["detail"] = {
        "verdict": {"due": due, "alarm": any(line.alarm for line in lines), "words": words},
        "said": [words, *NOT_SHOWN],
        "rule": {"false_alarms": shift.RATE, "due_auroc": DUE_AUROC, "due_far": DUE_FAR, "far_percentile": OUT},
        "comparisons": [as_dict(line) for line in [*lines, *checked]],
        "farthest": [
            {"key": new.key(int(asked.numbers[i])), "distance": distance[i], "percentile": percentile[i]} for i in far
        ],
    }
    all_new = lines[0]
    figures = {"mmd2": all_new.found.mmd2, "c2st_auroc": all_new.found.auroc, "far_share": all_new.far}
    arrays = {"number": asked.numbers, "group": asked.group, "distance": distance, "percentile": percentile}
    arrays |= {"own_distance": own, "null": all_new.found.null}
    path = results.write(args.out / "drift", about, figures, **arrays)
    curves = {"reference, held out": own, "new": distance}
    page = drift_page.page(about, asked, reference, far, nearest[far], curves)
    page.write(path.with_name("report.html"))
    show([*lines, *checked], words, notes, path)


def reference_of(index: Index, encoder: Encoder) -> tuple[Array, Array, list[str]]:
    """Numbers of what the backbone was trained on, of what it never read (for a control), and what to know of that."""
    train = labelfree.in_splits(index, ("train", ""))
    held_out = labelfree.in_splits(index, ("val", "test"))
    if encoder.digests is None:
        said = "the backbone does not record what it was trained on: the reference is the train split of --data"
        chosen = train
    else:
        read = np.isin(index.column("digest"), encoder.digests)
        chosen, held_out = np.flatnonzero(read), np.flatnonzero(~read)
        said = ""
        if not len(chosen):
            chosen, held_out = train, labelfree.in_splits(index, ("val", "test"))
            said = (
                "by its own record the backbone was trained on no image of --data: it is compared with its train split"
            )
    if not len(chosen):
        raise UserError(
            f"{index.root} has no image in its train split: name the index that the backbone was trained on"
        )
    return chosen, held_out, [said] if said else []


def periods_of(values: Array) -> Array:
    """str [N]: the month of each date, or the whole cell if there are few; numbers in PERIODS equal parts. "": none."""
    there = values != ""
    names = np.array(values, dtype=object)
    months = np.array([v[:7] for v in values], dtype=object)
    if all(len(v) >= 7 and v[:4].isdigit() and v[4] == "-" and v[5:7].isdigit() for v in values[there]):
        names = months
    elif len(np.unique(values[there])) > 3 * PERIODS:
        try:
            numbers = values[there].astype(float)
        except ValueError:
            raise UserError(f"--time: '{values[there][0]}' is no date (2026-06-30 or 2026-06) and no number") from None
        ends = np.unique(np.quantile(numbers, np.linspace(0, 1, PERIODS + 1)))
        at = np.clip(np.searchsorted(ends, numbers, "right") - 1, 0, len(ends) - 2)
        names[there] = [f"{ends[k]:g} to {ends[k + 1]:g}" for k in at]
        order = {name: k for k, name in enumerate(dict.fromkeys(names[there][np.argsort(numbers, kind="stable")]))}
        names[there] = [f"{order[name] + 1}: {name}" for name in names[there]]
    return names.astype(str)


def compare_parts(
    reference: Features, asked: Features, periods: Array | None, percentile: Array, seed: int
) -> tuple[list[Line], list[str]]:
    """All new images; each source, with the reference's images of that source where it has them; each period. And what
    is too small to be compared, with how many patients it has."""
    parts: list[tuple[str, str, Array, Array]] = [
        ("all", "all", np.ones(len(reference), bool), np.ones(len(asked), bool))
    ]
    names = np.array([*asked.index.sources, ""])[asked.source]
    known = np.array([*reference.index.sources, ""])[reference.source]
    for name in np.unique(names[names != ""]):
        rows = known == name
        same = len(np.unique(reference.group[rows])) >= 2 * LEAST
        label = str(name) if same else f"{name} (not in the reference)"
        if len(np.unique(names)) > 1 or (same and not rows.all()):
            parts.append(("source", label, rows if same else parts[0][2], names == name))
    for name in np.unique(periods[periods != ""]) if periods is not None else ():
        parts.append(("time", str(name), parts[0][2], periods == name))
    groups = [len(np.unique(asked.group[new])) for *_, new in parts]
    small = [f"{name} ({n})" for (_, name, _, _), n in zip(parts, groups, strict=True) if n < LEAST]
    parts = [part for part, n in zip(parts, groups, strict=True) if n >= LEAST]
    compared = [
        shift.compare(units(reference.take(old), seed), units(asked.take(new), seed), seed, enough(len(parts)) - 1)
        for _, _, old, new in track(parts, "comparing", console=Terminal(stderr=True), transient=True)
    ]
    corrected = holm([c.p for c in compared])
    lines = [
        Line(kind, name, int(new.sum()), c, far_share(percentile[new], asked.group[new]), p)
        for (kind, name, _, new), c, p in zip(parts, compared, corrected, strict=True)
    ]
    return lines, small


def control_line(reference: Features, control: Features, own: Array, seed: int) -> Line:
    """The reference's own images that the backbone never read: they should raise no alarm."""
    found = shift.compare(units(reference, seed), units(control, seed), seed)
    distance, _ = shift.distances(reference.x["cls"], reference.group, control.x["cls"], control.group)
    far = far_share(shift.percentile(own, distance), control.group)
    return Line("control", "held out of the reference index", len(control), found, far, found.p)


def units(part: Features, seed: int) -> Array:
    return part.x["cls"][shift.one_a_group(part.group, seed, shift.MOST)]


def far_share(percentile: Array, group: Array) -> Interval:
    """Share of images beyond OUT, with its interval over groups."""
    beyond = (percentile >= OUT).astype(float)
    share = {"far": lambda y, scores, weight: weight @ beyond / weight.sum(1)}
    return bootstrap(beyond, beyond[:, None], group, share)["far"]


def farthest(distance: Array, group: Array, most: int = 24) -> Array:
    """Rows of the images farthest out, one a group, the farthest first."""
    order = np.argsort(-distance, kind="stable")
    first = np.unique(group[order], return_index=True)[1]
    return order[np.sort(first)[:most]]


def verdict(lines: list[Line], control: list[Line]) -> tuple[bool, str]:
    """Is retraining due, and a plain sentence why (not)."""
    alarms = [line for line in lines if line.alarm]
    due = [line for line in alarms if line.large]
    rate = f"{shift.RATE:.0%} false alarms"
    if not alarms:
        words = f"No drift shown: no comparison is beyond its threshold ({rate}). Retraining is not due for drift."
    elif not due:
        names = ", ".join(line.name for line in alarms)
        words = (
            f"Drift shown ({names}; {rate}), but small: a classifier tells new from old with an AUROC that is not "
            f"shown to reach {DUE_AUROC}, and not shown to be more than {DUE_FAR:.0%} of the images are far out (5 % "
            "without drift). Watch it; retraining is not due yet."
        )
    else:
        reasons = "; ".join(
            f"{line.name}: AUROC of new against old {line.found.auroc}, {line.far.value:.0%} of the images far out"
            for line in due[:3]
        )
        reasons += f"; and {len(due) - 3} parts more" if len(due) > 3 else ""
        words = f"Retraining is due: the new images differ from what the backbone has seen, and by much ({reasons})."
    if alarms and any(line.alarm for line in control):
        words += (
            " But held-out images of the reference index raise the alarm too: a part of it says 'not seen in "
            "training', not 'changed'."
        )
    return bool(due), words


def as_dict(line: Line) -> dict[str, Any]:
    found = line.found
    interval = lambda m: {"value": m.value, "low": m.low, "high": m.high}  # noqa: E731
    return {
        "kind": line.kind,
        "name": line.name,
        "images": line.images,
        "groups": {"reference": found.reference, "new": found.new},
        "mmd2": interval(found.mmd2),
        "threshold": found.threshold,
        "p": found.p,
        "p_corrected": line.p,
        "alarm": line.alarm,
        "auroc": interval(found.auroc),
        "far_share": interval(line.far),
    }


def show(lines: list[Line], words: str, notes: list[str], path: Path) -> None:
    console, table = Terminal(), Table("part", "images", "MMD²", "threshold", "p", "AUROC new / old", "far out", "")
    for line in lines:
        f, flag = line.found, "ALARM" if line.alarm else ""
        value, limit, far = f"{f.mmd2.value:.4f}", f"{f.threshold:.4f}", f"{line.far.value:.0%}"
        table.add_row(line.name, f"{line.images:,}", value, limit, f"{line.p:.3f}", str(f.auroc), far, flag)
    console.print(table)
    console.print(words, style="bold")
    for note in notes:
        console.print(f"note: {note}")
    console.print(f"written: {path} and report.html", soft_wrap=True)
