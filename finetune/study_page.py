"""The one page of a study: its answer, every step's own figures, and a paragraph on what was and was not shown."""

from __future__ import annotations

import re
from pathlib import Path

from finetune import report, results
from finetune.pages import CLOSING, linked, plain
from finetune.results import Result
from finetune.studies import Step, Study, Values
from hybridssl.page import Markup, Page, body_of, inline
from shards.address import told

NOTE = re.compile(r'<p class="note \w+">.*?</p>\n?', re.DOTALL)


def page(study: Study, values: Values, steps: list[Step], out: Path) -> Page:
    """From what the steps left on disk: the body of each report.html, and a table of the results that have none."""
    html, target = Page(study.title, study.asks), out / "report.html"
    found = {step.title: _cells_apart(results.find(filter(_any, step.commands))) for step in steps}
    verdicts = [r for own in found.values() for r in own if r.protocol.startswith("compare-")]
    for result in verdicts or [r for own in found.values() for r in own][:1]:
        html.answer(_answer(result, target))
    facts = {key: told(", ".join(value) if isinstance(value, list) else value) for key, value in values.items()}
    html.facts([(key, value or "–") for key, value in facts.items()])
    noted: set[str] = set()
    for step in steps:
        if step.commands:
            html.section(step.title, step.why)
            _figures(html, step, found[step.title], target, noted)
    html.section(CLOSING)
    for title, own in found.items():
        several = len({report.label(result) for result in own}) > 1
        answers = dict.fromkeys(_answer(result, target, several) for result in own)
        limits = dict.fromkeys(inline(said[-1]) for result in own if len(said := _said(result)) > 1)
        if answers:
            html.text(Markup(f"<b>{inline(title)}</b> {' '.join([*answers, *limits])}"))
    html.text(f"Limits of this study: {' '.join(study.limits)}")
    for step in steps:
        if not step.commands and step.left_out:
            html.note(f"{step.title}: {step.left_out}", "warn")
    return html


def _figures(html: Page, step: Step, found: list[Result], out: Path, noted: set[str]) -> None:
    """The step's tables and the bodies of its pages, without their last section, and no note a second time."""
    pages = [path for folder in step.commands for path in _pages(folder)]
    bare = report.order([r for r in found if r.path.with_name("report.html") not in pages])
    report.leaks(html, bare)
    report.figures(html, bare, out)
    for path in pages:
        body = body_of(path, out.parent).partition(f"<h4>{CLOSING}</h4>")[0]
        html.raw(_once(body, noted))


def _once(body: str, noted: set[str]) -> Markup:
    """Without the notes that stand on the page already; those that now do are added to `noted`."""

    def keep(note: re.Match[str]) -> str:
        new = note[0] not in noted
        noted.add(note[0])
        return note[0] if new else ""

    return Markup(NOTE.sub(keep, body))


def _answer(result: Result, out: Path, several: bool = False) -> Markup:
    """The first sentence of a result's own page; of one without a page, its figure by the headline. several: there are
    other backbones, so it is said of which this holds."""
    if several and _said(result):
        return linked(f"{report.label(result)}: {_said(result)[0]}", result.path, out)
    name = report.headline(result)
    figure = f"{plain(name)} {result.metrics[name]}" if name else "no figure"
    said = _said(result) or [f"{report.label(result)}, {plain(result.protocol)}: {figure}."]
    return linked(said[0], result.path, out)


def _said(result: Result) -> list[str]:
    return (result.about.get("detail") or {}).get("said", [])


def _cells_apart(found: list[Result]) -> list[Result]:
    """Without the cells of a `scaling`, whose own page shows them."""
    return [r for r in found if "settings" not in (r.about.get("detail") or {})]


def _pages(folder: Path) -> list[Path]:
    """The reports below a folder that belong to results; a pretraining run's own report is a page for itself."""
    return [path for path in sorted(folder.rglob("report.html")) if path.with_name("results.json").is_file()]


def _any(folder: Path) -> bool:
    return next(folder.rglob("results.json"), None) is not None
