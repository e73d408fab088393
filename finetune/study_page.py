"""The one page of a study: its question, every step's own figures, and what was and was not shown."""

from __future__ import annotations

from pathlib import Path

from finetune import report, results
from finetune.studies import Step, Study, Values
from hybridssl.page import Page, body_of


def page(study: Study, values: Values, steps: list[Step], out: Path) -> Page:
    """From what the steps left on disk: the body of each report.html, and a table of the results that have none."""
    html, said, notes = Page(study.title, study.asks), [], []
    facts = {key: ", ".join(value) if isinstance(value, list) else value for key, value in values.items()}
    html.facts([(key, value or "–") for key, value in facts.items()])
    for step in steps:
        if not step.commands:
            notes += [f"{step.title}: {step.left_out}"] if step.left_out else []
            continue
        html.section(step.title, step.why)
        pages = [path for folder in step.commands for path in _pages(folder)]
        found = [result for folder in step.commands if _any(folder) for result in results.find([folder])]
        bare = [r for r in found if not any(p.parent == r.path.parent or p.parent in r.path.parents for p in pages)]
        if bare:
            html.absorb(report.page(report.order(bare), out / "report.html", step.title))
        for path in pages:
            html.raw(body_of(path, out))
        for result in found:
            said += [f"{step.title}: {line}" for line in result.about.get("detail", {}).get("said", [])]
    html.section("What was shown, and what was not")
    for line in dict.fromkeys(said):
        html.text(line)
    if not said:
        html.text("The tables above give each figure with its interval; no two of them were compared in pairs.")
    for line in [*notes, *(f"Not shown: {limit}" for limit in study.limits)]:
        html.note(line, "warn")
    return html


def _pages(folder: Path) -> list[Path]:
    """The reports below a folder that belong to results; a pretraining run's own report is a page for itself."""
    return [path for path in sorted(folder.rglob("report.html")) if path.with_name("results.json").is_file()]


def _any(folder: Path) -> bool:
    return next(folder.rglob("results.json"), None) is not None
