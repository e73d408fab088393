"""Collect results.json files into one table and one HTML page, each number linked to its file.

  python -m finetune report results --out results/report.html

Takes every result in and below the folders, whatever verb wrote it. Which of two backbones is better only `compare`
tells: a result of it that lies there is the first thing on the page. A .csv of all figures goes beside the page.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from pathlib import Path

from rich.table import Table

from finetune.better import direction, rank
from finetune.pages import cell, link, linked, plain, sentence, title
from finetune.results import Result, find, labels_alone, part
from hybridssl.charts import intervals
from hybridssl.errors import UserError
from hybridssl.files import write_text
from hybridssl.page import Markup, Page, inline
from shards.spreadsheet import safe
from shards.terminal import Terminal

ABOUT_RESULT = (
    "data",
    "source",
    "column",
    "protocol",
    "labels",
    "backbone",
    "baseline",
    "leak",
)  # columns of the table
OF_FIGURE = ("metric", "value", "low", "high", "file")
WIDE = 9  # a result with more figures than this is named and linked; its own page shows them
ABOUT = {
    "knn": "k nearest neighbours: what the features put side by side, with nothing trained on them.",
    "logistic": "Logistic regression on frozen features: how much a simple classifier reads out of them.",
    "linear": "A linear layer trained by SGD on frozen features, as DINOv2 reports it.",
    "fewshot": "A few labelled images a class, drawn many times: nearest class mean.",
    "retrieve": "Similar cases: of those found first, how many share the label.",
    "efficiency": "A head trained on N masks against a prompted model, by agreement of the measurements.",
    "explain": "Nearest labelled cases: how often they share the label.",
    "drift": "A new index against the one the backbone knows.",
    "select": "Which images to have labelled next.",
    "adapt-full": "The whole backbone trained on the labels.",
    "adapt-lora": "Low-rank updates of the backbone trained on the labels (LoRA).",
    "adapt-lpft": "The head first, then the whole backbone (LP-FT).",
    "adapt-partial": "A part of the backbone, or a head on top of it, trained on the labels.",
    "segment_linear": "Masks from frozen patches by one linear layer.",
    "segment_knn": "Masks from frozen patches by their nearest training patches.",
    "segment_upernet": "Masks from four frozen blocks by a UPerNet head.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="folders with results.json in or below them"
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page; a .csv goes beside it")
    parser.add_argument("--title", default="Evaluation", help="heading of the page")


def run(args: argparse.Namespace) -> None:
    if args.out.is_dir() or args.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {args.out} must be the name of an .html file")
    found = order(find(args.folders))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    page(found, args.out, args.title).write(args.out)
    table = args.out.with_suffix(".csv")
    write_text(table, as_csv(found))
    terminal = Table("protocol", "labels", "backbone", "test")
    for result in found:
        name = headline(result)
        value = f"{plain(name)} {result.metrics[name]}" if name else "-"
        terminal.add_row(result.protocol, share(result), label(result), value)
    Terminal().print(terminal)
    Terminal().print(f"written: {args.out} and {table}", soft_wrap=True)


def order(found: list[Result]) -> list[Result]:
    """By data, protocol and share of labels (all first); the best first inside."""

    def key(result: Result) -> tuple:
        data, name = result.about["data"], headline(result)
        worth = rank(name, result.metrics.get(name))
        return data["sha256"], part(data), result.protocol, -data["labels"], -worth

    return sorted(found, key=key)


def headline(result: Result) -> str:
    """The metric that stands for a result: the one that chose, or the first it has; "" when it has none."""
    by = (result.about.get("task") or {}).get("select_by", "balanced_accuracy")
    return by if by in result.metrics else next(iter(result.metrics), "")


def label(result: Result) -> str:
    about = result.about["backbone"]
    leak = " — LEAK" if result.leaks.any else ""
    return f"{about['name']}{' (baseline)' if about['baseline'] else ''}{leak}"


def share(result: Result) -> str:
    if alone := labels_alone(result.about):
        return alone
    used = result.about["cost"]["labels_used"]["train"] or [0]
    return f"{100 * result.about['data']['labels']:.3g} % ({round(sum(used) / len(used)):,})"


def page(found: list[Result], out: Path, heading: str) -> Page:
    """The answers, then one section a data set: backbones side by side as charts, then a table a protocol."""
    html = Page(
        heading,
        "Test figures; 95 % intervals over resampled patients or lesions; all choices were made on val. In bold, the "
        "best of those with equally many labels, where more or less of a figure is better by itself.",
    )
    if any(result.protocol == "scaling" for result in found):
        found = [r for r in found if "settings" not in (r.about.get("detail") or {})]  # its own page shows its cells
    notes = _notes(found)
    leaks(html, found)
    for answer in answers(found, out):
        html.answer(answer)
    for note in [note for note, where in notes.items() if len(where) == len(found)]:
        html.note(sentence(note), "warn")
    if found and not any(result.about["backbone"]["baseline"] for result in found):
        html.note("No null baseline here: --backbone random:SPEC and --backbone histogram show the floor.", "warn")
    for data_set in dict.fromkeys(_data_set(r) for r in found):
        here = [r for r in found if _data_set(r) == data_set]
        data = next((r for r in here if r.about["data"]["classes"]), here[0]).about["data"]
        name = ", ".join(filter(None, [data["index"], part(data)]))
        html.section(name, "Synthetic images: these figures say nothing about patients." if data["synthetic"] else "")
        groups = data["groups"]
        html.facts([(s, f"{count:,} images, {groups[s]:,} groups") for s, count in data["splits"].items()])
        _findings(html, here, out)
        figures(html, here, out)
        counts = [[label, *(per.get(s, 0) for s in data["splits"])] for label, per in data["classes"].items()]
        if counts:
            html.table(["class", *data["splits"]], counts, caption="Labelled images a class")
    few = {note: where for note, where in notes.items() if len(where) < len(found)}
    if few:
        html.section("What to know of single results")
    for note, where in few.items():
        html.text(f"{sentence(note)} Holds for {', '.join(where)}.")
    return html


def figures(html: Page, found: list[Result], out: Path) -> None:
    """Backbones side by side as charts, then a table a protocol; results that have a page and no rival need neither."""
    narrow = [r for r in found if len(r.metrics) <= WIDE]
    html.figures([_chart(rows) for rows in _by(narrow, "labels") if len(rows) > 1])
    for rows in _by(narrow):
        if len(rows) > 1 or not _finding(rows[0]):
            _table(html, rows, out)
    _links(html, [r for r in found if len(r.metrics) > WIDE and not _finding(r)], out)


def answers(found: list[Result], out: Path) -> list[str | Markup]:
    """What was compared in pairs; where nothing was, the best figure of each protocol, which no test supports."""
    compared = [r for r in found if r.protocol.startswith("compare-") and _finding(r)]
    if compared:
        return [linked(_finding(r), r.path, out) for r in compared]
    said: list[str | Markup] = []
    for rows in _by(found):
        name = headline(rows[0])
        rivals = [r for r in rows if _data_set(r) == _data_set(rows[0]) and headline(r) == name]
        rivals = [r for r in rivals if r.about["data"]["labels"] == rows[0].about["data"]["labels"]]
        if len(rivals) > 1 and (way := direction(name)):
            first = max(rivals, key=lambda r: rank(name, r.metrics[name]))
            figure, most = linked(str(first.metrics[name]), first.path, out), "highest" if way > 0 else "lowest"
            words = f"{title(rows[0].protocol)}: the {most} {plain(name)} of {len(rivals)} is that of "
            said.append(Markup(f"{inline(words + label(first))}, {figure}."))
    return [*said, "Which differences are more than chance, only python -m finetune compare tells."] if said else []


def _findings(html: Page, found: list[Result], out: Path) -> None:
    """What the results with a page of their own say, in their first sentence."""
    for result in found:
        if finding := _finding(result):
            who = f"<b>{inline(_named(result, out, title(result.protocol)))}</b>, {inline(label(result))}"
            html.text(Markup(f"{who}: {linked(finding, result.path, out)}"))


def _finding(result: Result) -> str:
    """The first sentence of a result's own page; "" where it has none."""
    return next(iter((result.about.get("detail") or {}).get("said", [])), "")


def _data_set(result: Result) -> tuple[str, str]:
    return result.about["data"]["sha256"], part(result.about["data"])


def _by(results: list[Result], *columns: str) -> list[list[Result]]:
    """Results of one protocol together, and of equal `columns` of their data."""
    parts: dict[tuple, list[Result]] = {}
    for result in results:
        parts.setdefault((result.protocol, *(result.about["data"][c] for c in columns)), []).append(result)
    return list(parts.values())


def _chart(rows: list[Result]) -> tuple[Markup, str]:
    name = headline(rows[0])
    bars = [(label(r), m.value, m.low, m.high) for r in rows if (m := r.metrics.get(name))]
    taught = labels_alone(rows[0].about) or f"{100 * rows[0].about['data']['labels']:.3g} % of the labels"
    return intervals(bars, f"{title(rows[0].protocol)}, {taught}"), f"{title(name)}, 95 %"


def leaks(html: Page, found: list[Result]) -> None:
    said = [(r.about["backbone"]["name"], r.protocol, what) for r in found for what in r.leaks.sentences()]
    for name, protocol, what in dict.fromkeys(said):
        html.note(f"Leak, allowed by hand: {name} ({protocol}): {what}: the figures are too good.", "bad")


def _notes(found: list[Result]) -> dict[str, list[str]]:
    """Every note, and the results that it holds for."""
    notes: dict[str, list[str]] = {}
    for result in found:
        for note in result.about.get("notes", []):
            notes.setdefault(note, []).append(f"{result.about['backbone']['name']} ({plain(result.protocol)})")
    return notes


def _table(html: Page, rows: list[Result], out: Path) -> None:
    """All results of one protocol; the best of those with equally many labels in bold."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    best: dict[tuple[float, str], float] = {}
    rivals = [row.about["data"]["labels"] for row in rows]
    for row in rows:
        for name, m in row.metrics.items():
            at = row.about["data"]["labels"], name
            best[at] = max(best.get(at, -math.inf), rank(name, m))
    strong = [
        (r, 2 + c)
        for r, row in enumerate(rows)
        for c, name in enumerate(metrics)
        if name in row.metrics
        and rivals.count(row.about["data"]["labels"]) > 1
        and rank(name, row.metrics[name]) == best[row.about["data"]["labels"], name] > -math.inf
    ]
    lines = [
        [
            _named(row, out),
            share(row),
            *(_cell(row, m, out) for m in metrics),
            chosen(row),
            round(row.about["cost"]["seconds"]),
        ]
        for row in rows
    ]
    header = ["backbone", "train labels", *map(plain, metrics), "chosen on val", "seconds"]
    about = ABOUT.get(rows[0].protocol)
    html.text(Markup(f"<b>{inline(title(rows[0].protocol))}</b> {inline(about or '')}"))
    html.table(header, lines, strong=strong)


def _links(html: Page, rows: list[Result], out: Path) -> None:
    """Results that have a page of their own and too many figures for a table: their headline, linked."""
    lines = []
    for row in rows:
        name = headline(row)
        lines.append([plain(row.protocol), _named(row, out), share(row), plain(name), _cell(row, name, out)])
    if lines:
        html.text("Results with more figures than a table holds: their own pages show them.")
        html.table(["protocol", "backbone", "train labels", "metric", "test"], lines)


def _named(result: Result, out: Path, words: str = "") -> str | Markup:
    """The backbone, or other words, linked to the result's own page where there is one."""
    page, words = result.path.with_name("report.html"), words or label(result)
    return link(words, page, out) if page.is_file() else words


def _cell(result: Result, name: str, out: Path) -> Markup | None:
    metric = result.metrics.get(name)
    return metric and cell(metric, result.path, out)


def chosen(result: Result) -> str:
    """The choice of the first seed, in words, and how many seeds there are."""
    choices = result.about["selected"]["choices"]
    words = ", ".join(
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
        for k, v in choices[0].items()
        if k not in ("seed", "val", "converged", "cell") and not isinstance(v, dict)
    )
    return words + (f"; {len(choices)} seeds" if len(choices) > 1 else "")


def as_csv(found: list[Result]) -> str:
    """All figures, a row each. Text that a spreadsheet would run as a formula is quoted."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*ABOUT_RESULT, *OF_FIGURE))
    for result in found:
        data, backbone = result.about["data"], result.about["backbone"]
        lead = [data["index"], data["source"] or "", data.get("column") or "", result.protocol, data["labels"]]
        lead += [backbone["name"], backbone["baseline"], result.leaks.any]
        for name, m in result.metrics.items():
            writer.writerow(map(safe, [*lead, name, m.value, m.low, m.high, result.path]))
    return text.getvalue()
