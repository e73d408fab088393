"""Is the model as good for every kind of patient? Judges results that exist, by any column of the table.

  python -m finetune fair results/derm-s/knn --by sex
  python -m finetune fair results/derm-s/logistic --by age --bins 0 30 60 200 --positive mel bcc
  python -m finetune fair results/derm-s --by fitspatrick --merge I-II=1,2 III-VI=3,4,5,6

Every metric of the result within each subgroup of the test images, the worst subgroup, the gap between best and worst,
and each subgroup against all others, with 95 % intervals over the same resampled patients or lesions. With --positive
also the gaps in sensitivity and specificity, whose larger one is the equalised-odds gap (Hardt et al. 2016). A subgroup
with few images or patients, or without an image of a class that the metric averages over, is listed and not ranked.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from rich.table import Table

from finetune import judged, results, subgroups
from finetune.fairness import ALPHA, Fairness, judge
from finetune.judged import Judged
from finetune.kinds import Kind, choose
from finetune.pages import begin, cell, close, plain, title
from finetune.resample import GROUPS
from hybridssl.charts import intervals
from hybridssl.errors import UserError
from hybridssl.page import Page
from shards.terminal import Terminal

LEAST = 30
DIFFERENCE = "95 %; an interval over 0 shows no difference"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    judged.add_arguments(parser)
    subgroups.add_arguments(parser, required=True)
    add = parser.add_argument
    add("--positive", nargs="+", metavar="CLASS", help="classes that count as disease; default: those of the result")
    add("--metric", metavar="NAME", help="which ranks; default: disease_auroc with --positive, else what chose on val")
    least = f"test images that a subgroup needs to be ranked ({LEAST}), and patients or lesions, up to {GROUPS} of them"
    add("--least", type=int, default=LEAST, metavar="N", help=least)


def run(args: argparse.Namespace) -> None:
    found = judged.find(args.results)
    folders = judged.places(found, f"fair-{_word(args.by)}", args.out, args.overwrite)
    questions = [_question(one, args) for one in found]  # all are checked before the first is worked on
    for one, folder, (kind, headline) in zip(found, folders, questions, strict=True):
        started = time.monotonic()
        values = subgroups.of_images(one.index(args.data), one.number, args)
        doing = f"subgroups of {one.name} ({one.result.protocol})"
        found_fair = judge(one, kind, values, args.least, headline, doing)
        _write(one, found_fair, kind, headline, values, folder, args.by, started)


def _question(one: Judged, args: argparse.Namespace) -> tuple[Kind, str]:
    kind = choose(one.kind.name, one.classes, args.positive or one.kind.positive)
    headline = args.metric or ("disease_auroc" if args.positive else kind.select_by)
    if headline not in kind.metrics:
        raise UserError(f"--metric {headline}: {one.result.path} allows {', '.join(kind.metrics)}")
    return kind, headline


def _write(
    one: Judged, fair: Fairness, kind: Kind, headline: str, values: np.ndarray, folder: Path, by: str, started: float
) -> None:
    gap, rows = fair.gaps[headline], fair.standing[headline]
    metrics = {
        **fair.overall,
        f"{headline}_worst": rows[gap.worst].value,
        **{f"{name}_gap": other.difference for name, other in fair.gaps.items()},
        **{f"{headline} in {name}": s.value for name, s in rows.items()},
    }
    if odds := fair.equalised_odds:
        metrics["equalised_odds_gap"] = odds[1].difference
    detail = {"by": by, "headline": headline, **fair.as_dict(), "said": sentences(fair, headline, by)}
    about = one.about(folder.name, started, notes=_notes(fair, headline), detail=detail)
    about["task"] = kind.as_dict()
    codes = {name: code for code, name in enumerate(fair.sizes)}
    path = results.write(
        folder, about, metrics, number=one.number, group=one.group, subgroup=np.array([codes[v] for v in values])
    )
    page(one, about, fair, headline, by, path).write(folder / "report.html")
    _show(one, fair, headline, by, path)


def sentences(fair: Fairness, headline: str, by: str) -> list[str]:
    """What was shown, and what was not."""
    rows, gap, name = fair.standing[headline], fair.gaps[headline], plain(headline)
    said = []
    differs = [f"{s} is {row.verdict}, {row.against_rest.signed()}" for s, row in rows.items() if row.p <= ALPHA]
    if differs:
        said.append(f"By {name}, {'; '.join(differs)} (corrected for {len(rows)} subgroups).")
    else:
        open_to = max((abs(e) for r in rows.values() for e in (r.against_rest.low, r.against_rest.high)), default=0)
        room = f" The intervals leave room for a difference of up to {open_to:.2f}." if np.isfinite(open_to) else ""
        said.append(
            f"By {name}, no subgroup of {plain(by)} was shown to differ from the rest. That does not show them "
            f"equal.{room}"
        )
    said.append(
        f"Worst: {gap.worst}, {rows[gap.worst].value}; best: {gap.best}, {rows[gap.best].value}; gap {gap.difference}."
    )
    if odds := fair.equalised_odds:
        which, wide = odds
        said.append(f"Equalised odds: the larger gap is in {which}, {wide.worst} under {wide.best}: {wide.difference}.")
    said.append(
        "Not shown: why. A difference between subgroups may come from harder cases, other cameras or labels as well as "
        "from the model: this is a comparison within the test images, not a cause."
    )
    return said


def _notes(fair: Fairness, headline: str) -> list[str]:
    out = [f"{name} ({why})" for name, why in fair.unranked[headline].items()]
    return [f"listed but not ranked by {plain(headline)}: {'; '.join(out)}"] if out else []


def page(one: Judged, about: dict, fair: Fairness, headline: str, by: str, path: Path) -> Page:
    out, name = path.with_name("report.html"), plain(headline)
    html = Page(
        f"As good for everyone? {title(by)}",
        f"{one.name}, {plain(one.result.protocol)} on {about['data']['index']}, {one.y.shape[0]:,} test images",
    )
    begin(html, about, path)
    html.section("Subgroups", "Each by itself, and against all others.")
    rows, overall = fair.standing[headline], fair.overall[headline]
    bars = [("all", overall), *((s, r.value) for s, r in rows.items())]
    rest = [(s, r.against_rest) for s, r in rows.items()]
    charts = [(bars, title(headline), "each by itself, 95 %"), (rest, "The same, minus the rest", DIFFERENCE)]
    html.figures(
        [(intervals([(s, m.value, m.low, m.high) for s, m in own], title), said) for own, title, said in charts]
    )
    table = []
    for s, (images, groups) in fair.sizes.items():
        if s in rows:
            r = rows[s]
            figures = [cell(r.value, path, out), cell(r.against_rest, path, out, signed=True), f"{r.p:.3g}", r.verdict]
        else:
            figures = [None, None, None, f"not ranked: {fair.unranked[headline][s]}"]
        table.append([s, images, groups, *figures])
    html.table([plain(by), "images", "groups", name, "minus the rest", "p (Holm)", "verdict"], table)
    html.section("Every metric", "The gap between the best and the worst subgroup, by whichever metric allows it.")
    gaps = [
        [plain(m), cell(fair.overall[m], path, out), g.worst, g.best, cell(g.difference, path, out)]
        for m, g in fair.gaps.items()
    ]
    html.table(["metric", "all", "worst", "best", "gap"], gaps)
    kept = [m for m in fair.standing if m in fair.gaps]
    per = []
    for s in fair.sizes:
        standings = [fair.standing[m].get(s) for m in kept]
        per.append([s, *(cell(found.value, path, out) if found else None for found in standings)])
    html.table([plain(by), *map(plain, kept)], per)
    close(html, about, path)
    return html


def _show(one: Judged, fair: Fairness, headline: str, by: str, path: Path) -> None:
    console, rows = Terminal(), fair.standing[headline]
    console.print(f"{one.name}, {one.result.protocol}, by {by}", style="bold", soft_wrap=True)
    table = Table(by, "images", "groups", plain(headline), "minus the rest", "verdict")
    for s, (images, groups) in fair.sizes.items():
        r = rows.get(s)
        figures = [str(r.value), r.against_rest.signed(), r.verdict] if r else ["-", "-", fair.unranked[headline][s]]
        table.add_row(s, f"{images:,}", f"{groups:,}", *figures)
    console.print(table)
    for sentence in sentences(fair, headline, by)[:-1]:
        console.print(sentence)
    console.print(f"written: {path} and report.html beside it", soft_wrap=True)


def _word(name: str) -> str:
    """A column's name as part of a folder's."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower() or "column"
