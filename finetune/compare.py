"""Is this backbone better than that one, or did the test images happen to suit it? Judges results that exist.

  python -m finetune compare results/*/knn --against results/dinov2-s/knn --out results
  python -m finetune compare results/mine/logistic results/dinov2-s/logistic results/random/logistic --out results
  python -m finetune compare results/*/knn --all-pairs --out results

All results must be of one protocol on the same data, labels and test images. Each backbone is compared with the one
--against (default: the first named), or each with each: the difference of a metric on the same resampled patients or
lesions (paired bootstrap), its two-sided p-value, corrected for the number of comparisons (Holm 1979), and the verdict
"better", "worse" or "not shown to be better". Where the results are of several draws of a part of the labels, the draws
are resampled too. Fewer than six patients or lesions can show nothing. Name all that is to be compared in one call: it
writes OUT/compare-PROTOCOL/results.json and report.html, and does not replace a comparison of other results.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from finetune import judged, metrics, results
from finetune.judged import Judged
from finetune.metrics import Interval
from finetune.pages import begin, cell, close, plain, title
from finetune.resample import Draws, Statistic, enough, holm, mean, mean_of_drawn, resample
from hybridssl.charts import intervals
from hybridssl.errors import UserError
from hybridssl.page import Page
from shards.terminal import Terminal

RESAMPLES = 10_000  # at least: a verdict near 5 % should not hang on the draw
ALPHA = 0.05
NOT_SHOWN = "not shown to be better"


@dataclass(frozen=True)
class Comparison:
    a: str
    b: str
    difference: Interval  # a minus b, by the metric that decides
    p: float
    p_holm: float  # adjusted for the number of comparisons
    others: dict[str, Interval]  # the same difference by every other metric: no verdict hangs on it

    @property
    def verdict(self) -> str:
        if self.p_holm > ALPHA or np.isnan(self.difference.value):
            return NOT_SHOWN
        return "better" if self.difference.value > 0 else "worse"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="RESULT", help="folders with results.json of one protocol")
    pairs = parser.add_mutually_exclusive_group()
    pairs.add_argument("--against", type=Path, metavar="RESULT", help="whom to compare with; default: the first")
    pairs.add_argument("--all-pairs", action="store_true", help="compare each with each")
    add("--metric", metavar="NAME", help="which decides; default: the one that chose on val")
    add("--out", required=True, type=Path, metavar="DIR", help="where DIR/compare-PROTOCOL goes")
    add("--overwrite", action="store_true", help="replace a comparison of other results")


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    found = judged.find([args.against, *args.results] if args.against else args.results)
    if len(found) < 2:
        raise UserError(f"{found[0].result.path} is alone: name at least two results to compare")
    found = [found[0], *(_aligned(found[0], other) for other in found[1:])]
    reference, metric = found[0], args.metric or found[0].kind.select_by
    if metric not in reference.kind.metrics:
        raise UserError(f"--metric {metric}: {reference.result.path} allows {', '.join(reference.kind.metrics)}")
    folder = args.out / f"compare-{reference.result.protocol}"
    _check_room(folder, found, args.overwrite)
    results.check_room(folder, {**reference.result.about, "protocol": folder.name}, args.overwrite)

    named = labels(found)
    pairs = list(combinations(named, 2)) if args.all_pairs else [(name, next(iter(named))) for name in list(named)[1:]]
    values, compared = compare(named, pairs, metric)
    figures = {f"{metric}: {name}": m[metric] for name, m in values.items()}
    figures |= {f"{metric}: {c.a} minus {c.b}": c.difference for c in compared}
    detail = {
        "metric": metric,
        "resamples": enough(len(pairs), RESAMPLES),
        "results": {name: str(one.result.path) for name, one in named.items()},
        "values": {name: {m: asdict(i) for m, i in own.items()} for name, own in values.items()},
        "comparisons": [{**asdict(c), "verdict": c.verdict} for c in compared],
        "said": sentences(compared, metric),
    }
    about = reference.about(folder.name, started, notes=_notes(found), detail=detail)
    path = results.write(folder, about, figures, number=reference.number, group=reference.group, y=reference.y)
    page(about, named, values, compared, path).write(folder / "report.html")
    _show(about, compared, path)


def _check_room(folder: Path, found: list[Judged], overwrite: bool) -> None:
    """UserError before any work when `folder` holds a comparison of other results: verdicts must not vanish unseen."""
    path = folder / "results.json"
    if overwrite or not path.exists():
        return
    there = (results.read(path).about.get("detail") or {}).get("results", {})
    if {Path(name).resolve() for name in there.values()} != {one.result.path.resolve() for one in found}:
        raise UserError(
            f"{path} compares other results ({', '.join(there) or 'none that it names'}): name all of them in one "
            "call, which corrects for their number; or choose another --out, or --overwrite"
        )


def _aligned(first: Judged, other: Judged) -> Judged:
    """`other` in the image order of `first`. UserError that says in what they differ."""
    a, b = first.result, other.result
    for what, at in {
        "protocol": lambda r: r.protocol,
        "index (sha256)": lambda r: r.about["data"]["sha256"],
        "source": lambda r: r.about["data"]["source"],
        "column": lambda r: r.about["data"].get("column"),
        "share of labels": lambda r: r.about["data"]["labels"],
        "most labelled images a class": lambda r: max(r.about["selected"].get("grid", {}).get("shots") or [0]),
        "task": lambda r: (r.about["task"]["kind"], tuple(r.about["data"]["classes"])),
    }.items():
        if at(a) != at(b):
            raise UserError(
                f"{a.path} and {b.path} differ in {what} ({at(a)}; {at(b)}): only the same question can be compared"
            )
    here, there = np.argsort(first.number, kind="stable"), np.argsort(other.number, kind="stable")
    if not np.array_equal(first.number[here], other.number[there]):
        unshared = len(np.setxor1d(first.number, other.number))
        raise UserError(
            f"{a.path} and {b.path} were not judged on the same test images ({unshared:,} in only one of them): "
            "evaluate both again"
        )
    rows = np.empty(len(here), dtype=np.int64)
    rows[here] = there
    if not np.array_equal(first.y, other.y[rows]) or not np.array_equal(first.group, other.group[rows]):
        raise UserError(f"{a.path} and {b.path} do not agree on labels or groups of the test images: evaluate again")
    return replace(
        other, scores=other.scores[:, rows], y=other.y[rows], group=other.group[rows], number=other.number[rows]
    )


def labels(found: list[Judged]) -> dict[str, Judged]:
    """A name each: the backbone's, and the folder where that is not enough."""
    names = [one.name for one in found]
    return {
        name if names.count(name) == 1 else f"{name} ({one.result.path.parent})": one
        for name, one in zip(names, found, strict=True)
    }


def compare(
    named: dict[str, Judged], pairs: list[tuple[str, str]], metric: str
) -> tuple[dict[str, dict[str, Interval]], list[Comparison]]:
    """Every metric of each, and the comparisons of `pairs`: all on the same resampled groups, mean over seeds, which
    are resampled too where they are draws of the labels."""
    first = next(iter(named.values()))
    rest = [name for name in first.kind.metrics if name != metric]
    draws = _draws(named, [metric], enough(len(pairs), RESAMPLES), f"{metric} of {len(named)} results")
    more = _draws(named, rest, metrics.RESAMPLES, "the other metrics") if rest else {}
    draws = {name: draws[f"{metric}: {name}"] for name in named}
    values = {name: {metric: draws[name].interval} | {m: more[f"{m}: {name}"].interval for m in rest} for name in named}
    differences = [draws[a] - draws[b] for a, b in pairs]
    compared = []
    for (a, b), difference, adjusted in zip(pairs, differences, holm([d.p for d in differences]), strict=True):
        by_rest = {m: _minus(more, m, a, b).interval for m in rest}
        compared.append(Comparison(a, b, difference.interval, difference.p, adjusted, by_rest))
    return values, compared


def _draws(named: dict[str, Judged], names: list[str], resamples: int, doing: str) -> dict[str, Draws]:
    """(METRIC: NAME) -> its draws, all on the same resampled groups."""
    first = next(iter(named.values()))
    statistics: dict[str, Statistic] = {}
    for m in names:
        function = first.kind.metrics[m]
        for name, one in named.items():
            for s, scores in enumerate(one.scores):
                statistics[f"{m}: {name} {s}"] = lambda w, f=function, y=one.y, scores=scores: f(y, scores, w)
    draws = resample(statistics, first.group, resamples, doing=doing)
    lists = list(dict.fromkeys(tuple(one.result.about["seeds"]) for one in named.values()))
    found = {}
    for name, one in named.items():
        # Equal seeds drew the same labels: they are picked together, and the difference is paired in them as well.
        seed = lists.index(tuple(one.result.about["seeds"]))
        for m in names:
            own = [draws[f"{m}: {name} {s}"] for s in range(len(one.scores))]
            found[f"{m}: {name}"] = mean_of_drawn(own, seed) if one.result.drawn_labels else mean(own)
    return found


def _minus(draws: dict[str, Draws], metric: str, a: str, b: str) -> Draws:
    return draws[f"{metric}: {a}"] - draws[f"{metric}: {b}"]


def sentences(compared: list[Comparison], metric: str) -> list[str]:
    """What was shown, and what was not."""
    by, said, shown = plain(metric), [], [c for c in compared if c.verdict != NOT_SHOWN]
    words = [f"{c.a} is {c.verdict} than {c.b}" for c in shown]
    if shown and len(shown) < len(compared):
        words.append(f"of the other {len(compared) - len(shown):,} none is shown to be better or worse")
    elif not shown:
        names, others = (list(dict.fromkeys(side)) for side in zip(*((c.a, c.b) for c in compared), strict=True))
        who = f"{names[0]} is not" if len(names) == 1 else f"none of {', '.join(names)} is"
        words.append(f"{who} shown to be better or worse than {' or '.join(others)}")
    said.append(f"By {by}: {'; '.join(words)}.")
    for c in compared:
        if c.verdict == NOT_SHOWN:
            room = max(abs(c.difference.low), abs(c.difference.high))
            left = "one patient tells nothing of others" if np.isnan(room) else f"up to {room:.3f} is left open"
            said.append(
                f"{c.a} is not shown to be better or worse than {c.b}: {by} differs by {c.difference.signed()}. "
                f"That does not show them equal: {left}."
            )
        else:
            said.append(f"{c.a} is {c.verdict} than {c.b}: {by} differs by {c.difference.signed()}, p {c.p_holm:.2g}.")
    said.append("Not shown: that this holds in another hospital, or once the backbones are trained on the labels.")
    return said


def _notes(found: list[Judged]) -> list[str]:
    said = []
    if len({tuple(one.result.about["seeds"]) for one in found}) > 1:
        said.append("the results were made with different seeds: part of a difference may be the draw of labels")
    if any(one.result.drawn_labels for one in found):
        said.append("the seeds drew different labels: intervals and p-values resample these draws with the patients")
    if not any(one.result.about["backbone"]["baseline"] for one in found):
        said.append("no null baseline among them: add random:SPEC or histogram to see the floor")
    said += [
        f"{one.name}: {leak}, allowed by hand" for one in found[1:] for leak in one.result.leaks.sentences()
    ]  # the reference's own are shown in red
    return said


def page(
    about: dict[str, Any],
    named: dict[str, Judged],
    values: dict[str, dict[str, Interval]],
    compared: list[Comparison],
    path: Path,
) -> Page:
    out, metric = path.with_name("report.html"), about["detail"]["metric"]
    said, data = plain(metric), about["data"]
    protocol = plain(about["judged"]["protocol"])
    html = Page("Which backbone is better?", f"{protocol} on {data['index']}, {data['splits']['test']:,} test images")
    begin(html, about, path)
    html.section("Verdicts", f"By {said}, on the same resampled patients or lesions; 5 % for all comparisons together.")
    bars = [(name, m[metric].value, m[metric].low, m[metric].high) for name, m in values.items()]
    one_b = len({c.b for c in compared}) == 1
    steps = [
        (c.a if one_b else f"{c.a} − {c.b}", c.difference.value, c.difference.low, c.difference.high) for c in compared
    ]
    less = f"The same, minus {compared[0].b}" if one_b else "Differences"
    charts = [(intervals(bars, title(metric)), "each by itself, 95 %"), (intervals(steps, less), "paired, 95 % each")]
    html.figures(charts)
    rows = [
        [c.a, c.b, cell(c.difference, path, out, signed=True), f"{c.p:.2g}", f"{c.p_holm:.2g}", c.verdict]
        for c in compared
    ]
    strong = [(n, 5) for n, c in enumerate(compared) if c.verdict != NOT_SHOWN]
    html.table(["backbone", "against", said, "p", "p (Holm)", "verdict"], rows, strong=strong)
    html.section("Every metric", "Each by itself, then the paired differences. No verdict hangs on these.")
    header = [plain(m) for m in next(iter(values.values()))]
    own = [[name, *(cell(m, named[name].result.path, out) for m in per.values())] for name, per in values.items()]
    html.table(["backbone", *header], own)
    rest = [[f"{c.a} − {c.b}", *(cell(m, path, out, signed=True) for m in c.others.values())] for c in compared]
    html.table(["difference", *(plain(m) for m in compared[0].others)], rest)
    close(html, about, path)
    return html


def _show(about: dict[str, Any], compared: list[Comparison], path: Path) -> None:
    console, metric = Terminal(), plain(about["detail"]["metric"])
    console.print(f"{about['protocol']} on {about['data']['index']}", style="bold", soft_wrap=True)
    table = Table("backbone", "against", metric, "p (Holm)", "verdict")
    for c in compared:
        table.add_row(c.a, c.b, c.difference.signed(), f"{c.p_holm:.2g}", c.verdict)
    console.print(table)
    console.print(about["detail"]["said"][0], soft_wrap=True)  # whole, where names in the table are cut
    for note in about["notes"]:
        console.print(f"note: {note}")
    console.print(f"written: {path} and report.html beside it", soft_wrap=True)
    everything = path.parent.parent
    console.print(f"next: python -m finetune report {everything} --out {everything / 'report.html'}", soft_wrap=True)
