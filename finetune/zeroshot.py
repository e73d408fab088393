"""Classes that were never labelled: can the backbone find them by their names in words?

Takes a run folder (no export) whose label head started from text (objectives.labels.init=text): a class that the labels
of the pretraining named has its trained prototype; any other is placed by the same encoder and the same map, from its
name, synonyms and definition. Takes also CLIP-like models with a text half (hf:ID). No label is used. Reported over
all classes at once (generalised zero-shot), and over the images of the classes that were labelled in pretraining
(`_seen`) and of those that were not (`_unseen`), with their harmonic mean (Xian 2017, 1707.00600, section 3.3).

--text is a table as `python -m hybridssl prototypes` reads it (class,name,synonyms,definition); without one, the
classes.csv beside the shards. --encoder is needed only where the recipe names none.

  python -m finetune zeroshot --backbone runs/derm-text --data data/derm --text classes.csv --out results/derm-text
  python -m finetune zeroshot --backbone hf:openai/clip-vit-base-patch16 --data data/derm --out results/clip
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from finetune import metrics, options, task, written
from finetune.kinds import Kind
from finetune.metrics import Interval, Metric
from finetune.pages import begin, cell, close, plain, title
from finetune.probe import link
from finetune.results import interval
from finetune.words import WordHead, of_run, of_two_towers, words
from hybridssl.charts import intervals
from hybridssl.errors import UserError
from hybridssl.page import Markup, Page
from hybridssl.text import ClassText

Array = np.ndarray
FORMS = "run folder with a text label head | hf:ID of a CLIP-like model | random:RUN (its null baseline)"
SPLIT = ("balanced_accuracy", "macro_auroc")  # what is also told for seen and unseen classes apart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser, forms=FORMS)
    parser.add_argument("--text", type=Path, metavar="CSV", help="class,name,synonyms,definition of every class")
    parser.add_argument("--encoder", metavar="ID", help="text encoder of the pretraining, where the recipe names none")


def run(args: argparse.Namespace) -> None:
    spec = args.backbone.removeprefix("random:")  # fresh image weights against the true prototypes: the null baseline
    if spec == "histogram" or spec.startswith("timm:"):
        raise UserError(
            f"{spec} knows no words: zeroshot takes a run folder with a text label head, or a CLIP-like hf:ID"
        )
    if args.labels != 1:
        raise UserError("zeroshot uses no train label: leave --labels out")
    if args.encoder and spec.startswith("hf:"):
        raise UserError(f"--encoder does not go with {spec}, which is read by its own text half")
    work = task.prepare(args, ["zeroshot"], reads=("test",))
    known = words(args.text, work.index.root, work.classes)
    if spec.startswith("hf:"):
        head = of_two_towers(spec, known, work.encoder.dim)
    else:
        head = of_run(Path(spec), work.index, known, args.text, args.encoder)
    scores = link(head.logits(work.features.x["cls"][work.test]), work.kind.multi_label)
    y, group = work.y[work.test], work.features.group[work.test]
    asked = [int(k) for k in np.flatnonzero(work.counts(work.test))]
    seen = [k for k in asked if work.classes[k] in head.seen]
    unseen = [k for k in asked if work.classes[k] not in head.seen]
    found = metrics.bootstrap(y, scores, group, {**work.kind.metrics, **parted(work.kind, seen, unseen)})
    each = metrics.bootstrap(y, scores, group, _each(work.kind, work.classes))
    notes = [*work.notes([np.arange(len(work.y))]), *head.notes]  # all rows: no class is untaught where none is taught
    if not unseen:
        notes.append("every class was labelled in pretraining: these figures are of the label head, not zero-shot")
    detail = {
        "seen": [work.classes[k] for k in seen],
        "unseen": [work.classes[k] for k in unseen],
        "expressed": head.kept,
        "each": {name: asdict(m) for name, m in each.items()},
        "said": said(work.kind, found, bool(seen), [work.classes[k] for k in unseen], bool(head.kept)),
        "words": {c.key: [c.name, *c.synonyms, c.definition] for c in known},
    }
    path, about = written.write_fixed(
        work,
        "zeroshot",
        found,
        {"features": "cls", "scale": head.scale},
        [0] * len(args.seeds),
        notes,
        detail,
        scores=np.stack([scores] * len(args.seeds)).astype(np.float32),
    )
    page(about, found, path, known, head).write(path.with_name("report.html"))


# -------------------------------------------------------------------------------------------- metrics over some classes


def parted(kind: Kind, seen: list[int], unseen: list[int]) -> dict[str, Metric]:
    """The metrics of seen and of unseen classes; none where one of the two is empty."""
    if not (seen and unseen):
        return {}
    both = {"seen": seen, "unseen": unseen}
    out: dict[str, Metric] = {}
    if not kind.multi_label:
        out |= {f"balanced_accuracy_{name}": recall(part) for name, part in both.items()}
        s, u = out.values()

        def harmonic(y: Array, scores: Array, weight: Array) -> Array:
            a, b = s(y, scores, weight), u(y, scores, weight)
            return 2 * a * b / np.maximum(a + b, 1e-12)

        out["harmonic_mean"] = harmonic
        if len(unseen) > 1:
            out["balanced_accuracy_among_unseen"] = among(unseen)
    return out | {f"macro_auroc_{name}": auroc(part) for name, part in both.items()}


def recall(part: list[int]) -> Metric:
    """Mean recall of the classes `part`, where an image may be called any class."""
    return lambda y, scores, weight: metrics.balanced_accuracy(y, scores, weight * np.isin(y, part))


def among(part: list[int]) -> Metric:
    """Mean recall of the classes `part` where no other may be called: zero-shot as it was first asked."""
    place = np.array(sorted(part))
    return lambda y, scores, weight: metrics.balanced_accuracy(
        np.searchsorted(place, y), scores[:, place], weight * np.isin(y, place)
    )


def auroc(part: list[int]) -> Metric:
    """Mean area under the ROC curve of each class of `part` against all other images."""

    def metric(y: Array, scores: Array, weight: Array) -> Array:
        positive = y if y.ndim == 2 else np.eye(scores.shape[1], dtype=bool)[y]
        return metrics.macro_auroc(positive[:, part], scores[:, part], weight)

    return metric


def _each(kind: Kind, classes: tuple[str, ...]) -> dict[str, Metric]:
    out: dict[str, Metric] = {f"AUROC of {c}": auroc([k]) for k, c in enumerate(classes)}
    return out if kind.multi_label else out | {f"recall of {c}": recall([k]) for k, c in enumerate(classes)}


# ------------------------------------------------------------------------------------------------------------- the page


def page(about: dict[str, Any], found: dict[str, Interval], path: Path, known: list[ClassText], head: WordHead) -> Page:
    """The figures of all, seen and unseen classes, then every class with its words."""
    out, detail, data = path.with_name("report.html"), about["detail"], about["data"]
    multi, unseen = about["task"]["kind"] == "multi-label", detail["unseen"]
    html = Page(f"{about['backbone']['name']}: classes by their names", f"zero-shot, on {data['index']}")
    begin(html, about, path)
    html.section("All, seen and unseen classes" if unseen else "All classes", "No label was used here.")
    if unseen and detail["seen"]:
        html.figures([(_chart(found, name), "95 %") for name in (SPLIT[1:] if multi else SPLIT)])
    html.table(["", "test"], [[title(name), cell(m, path, out)] for name, m in found.items()])
    html.section("Class by class", "Seen: the images of the pretraining had labels of it. Unseen: placed by its words.")
    table, placed = [], bool(head.kept)
    for c in known:
        each = [interval(detail["each"][f"{w} of {c.key}"]) for w in (("AUROC",) if multi else ("AUROC", "recall"))]
        words = "; ".join(filter(None, (c.name, ", ".join(c.synonyms), c.definition)))
        table.append(
            [
                c.key,
                "seen" if c.key in head.seen else "unseen",
                data["classes"][c.key]["test"],
                *(cell(m, path, out) for m in each),
                *([head.kept.get(c.key)] if placed else []),
                words,
            ]
        )
    measured = ["AUROC", *([] if multi else ["recall"]), *(["of its text placed"] if placed else [])]
    html.table(["class", "labels", "test images", *measured, "words"], table)
    close(html, about, path)
    return html


def _chart(found: dict[str, Interval], name: str) -> Markup:
    rows = [(part, f"{name}{end}") for part, end in (("all", ""), ("seen", "_seen"), ("unseen", "_unseen"))]
    return intervals([(part, m.value, m.low, m.high) for part, key in rows if (m := found.get(key))], title(name))


def said(kind: Kind, found: dict[str, Interval], seen: bool, unseen: list[str], placed: bool) -> list[str]:
    """What the words alone do, and what that does not say."""
    lead = f"{plain(kind.select_by)} {found[kind.select_by]}"
    if not unseen:
        parts = [f"Every class was labelled in pretraining, so this is the label head and not zero-shot: {lead}."]
    else:
        auroc = found["macro_auroc_unseen" if seen else "macro_auroc"]
        many = f"The {len(unseen)} classes" if len(unseen) > 1 else "The class"
        parts = [
            f"{many} that no label of the pretraining named ({', '.join(unseen)}): macro AUROC {auroc}, where .5 is "
            f"chance. Over all classes: {lead}.",
            "An AUROC above .5 says that images of such a class lie nearer to its words than other images do; the "
            "recall also asks that no other class lies nearer, which labelled classes mostly do.",
        ]
    if placed:
        parts.append(
            "Of the text of a new class only the part in the span of the pretraining's classes can be placed (last but "
            "one column); what sets it apart from them in other directions is lost."
        )
    return [*parts, "Not shown: what a handful of labels would do, which fewshot tells, and what other words would."]
