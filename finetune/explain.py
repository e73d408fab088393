"""What did the backbone see in this case, and which labelled cases does it find alike?

For each case: where the class token looks (attention of the last block), which patches are like one patch of the
lesion, here and in the cases most alike, and the nearest labelled cases of the train split, of other patients, with
their class. With a RESULT folder (of `probe`, `knn`, `adapt` ...) also what the classifier said, and by default its
worst errors. Over the whole test split it measures how often the nearest cases share the label.

  python -m finetune explain --backbone models/derm-s --data data/derm --out results/derm-s --keys ISIC_0024306
  python -m finetune explain --backbone models/derm-s --data data/derm --out results/derm-s \\
      --result results/derm-s/logistic --worst 8

Attention and similarity show what a picture of features can show. Neither proves why a classifier decided as it did.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from finetune import explain_page, gallery, judged, labelfree, options, results, task
from finetune.explain_page import Case, Look
from finetune.features import Features, default_cache, extract
from finetune.judged import Judged
from finetune.metrics import Interval, bootstrap
from finetune.others import nearest
from finetune.task import Task
from hybridssl.errors import UserError
from shards.index import Index
from shards.terminal import Terminal

Array = np.ndarray
NEAR = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    add = parser.add_argument
    add("--keys", nargs="+", metavar="KEY", help="the cases to explain, by their keys in the index or how those begin")
    add("--result", type=Path, metavar="RESULT", help="folder of a result on this index: adds what its classifier said")
    add("--worst", type=int, default=8, metavar="N", help="without --keys: the N worst errors of RESULT (8)")
    place = "where in the image the patch lies that others are compared with, in shares of width and height; default: "
    place += "the mask of the lesion, or the patch most attended"
    add("--patch", nargs=2, type=float, metavar=("X", "Y"), help=place)


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    _sane(args)
    said = judged.read(_one(args.result)) if args.result else None
    work = task.prepare(args, ["explain"])
    if said:
        _check(said, work)
    train = work.taught(args.seeds[0])
    library, test = work.features.take(train), work.features.take(work.test)
    cases = cases_of(work, library, said)
    looks = [
        explain_page.look(work.encoder, work.index, case, args.patch)
        for case in track(cases, "looking", console=Terminal(stderr=True), transient=True)
    ]
    cosine, near = _nearest(library, test)
    share = shared(library.y[near], test.y[:, None]).mean(1)
    figures = bootstrap(test.y, share[:, None], test.group, PURITY)
    by_chance = chance_of(library.y, test.y)[:, None]
    chance = {name: float(p(test.y, by_chance, np.ones((1, len(test))))[0]) for name, p in PURITY.items()}
    choices = [{"seed": args.seeds[0], "k": NEAR}]
    about = work.about("explain") | {
        "selected": {"split": "none: nothing is chosen", "by": "", "grid": {}, "choices": choices},
        "cost": labelfree.cost(started, len(library)),
        "notes": work.notes([train]),
        "detail": {
            "neighbours": NEAR,
            "chance": chance,
            "said": explain_page.said(figures["neighbour_purity"], chance["neighbour_purity"], NEAR),
            "result": None if said is None else str(said.result.path),
            "cases": [as_dict(case, seen, work.index) for case, seen in zip(cases, looks, strict=True)],
        },
    }
    arrays = {"number": test.numbers, "group": test.group, "neighbour": library.numbers[near], "cosine": cosine}
    path = results.write(args.out / "explain", about, figures, **arrays)
    explain_page.page(about, figures, cases, looks, work.index, path).write(path.with_name("report.html"))
    show(about, figures, path)


def _sane(args: argparse.Namespace) -> None:
    if not args.keys and not args.result:
        raise UserError("which cases? Name some with --keys, or a RESULT whose worst errors are shown with --result")
    if args.patch and not all(0 <= v <= 1 for v in args.patch):
        raise UserError(f"--patch {args.patch[0]:g} {args.patch[1]:g}: X and Y are shares of width and height, 0 to 1")
    if args.worst < 1:
        raise UserError(f"--worst {args.worst} must be 1 or more")
    if args.positive or args.grades:
        raise UserError("explain asks whether neighbours share a label: leave --positive and --grades out")
    if len(args.seeds) > 1:
        raise UserError("explain shows the neighbours among one draw of the labels: name one of the --seeds")


def _one(folder: Path) -> results.Result:
    found = results.find([folder])
    if len(found) > 1:
        raise UserError(f"{folder} holds {len(found)} results: name the folder of one, such as {found[0].path.parent}")
    return found[0]


def _check(said: Judged, work: Task) -> None:
    """The result must be about these images and this backbone, or its probabilities explain nothing."""
    about = said.result.about
    if about["data"]["sha256"] != work.index.sha256:
        raise UserError(f"{said.result.path} is a result on another index ({about['data']['index']}) than --data")
    if about["backbone"]["sha256"] != work.encoder.sha256:
        raise UserError(f"{said.result.path} is a result of another backbone ({about['backbone']['name']})")


def worst(said: Judged, count: int) -> Array:
    """Numbers of the test images whose probabilities are farthest from the truth, one a patient or lesion."""
    scores = said.scores.mean(0)
    truth = said.y if said.kind.multi_label else np.eye(scores.shape[1])[said.y]
    order = np.argsort(-np.abs(scores - truth).mean(1), kind="stable")
    first = np.unique(said.group[order], return_index=True)[1]
    return said.number[order[np.sort(first)[:count]]]


def cases_of(work: Task, library: Features, said: Judged | None) -> list[Case]:
    """The cases named by --keys, or else the worst errors of the result, with their nearest labelled ones."""
    args = work.args
    chosen = gallery.numbers_of(work.index, args.keys) if args.keys or said is None else worst(said, args.worst)
    asked = extract(work.encoder, work.index, chosen, args.batch, args.workers, args.cache or default_cache())
    if len(asked) < len(chosen):
        raise UserError(f"{asked.bad[0]['key']} cannot be shown: {asked.bad[0]['reason']}")
    out = []
    for row, (cosine, near) in enumerate(zip(*_nearest(library, asked), strict=True)):
        number = int(asked.numbers[row])
        alike = [(int(library.numbers[i]), _names(library, i), float(c)) for i, c in zip(near, cosine, strict=True)]
        out.append(Case(asked.index.key(number), number, _names(asked, row), _probabilities(said, number), alike))
    return out


def _nearest(library: Features, asked: Features) -> tuple[Array, Array]:
    return nearest(library.x["cls"], library.group, asked.x["cls"], asked.group, NEAR)


def _names(part: Features, row: int) -> tuple[str, ...]:
    return tuple(part.classes[k] for k in np.flatnonzero(part.y[row]))


def _probabilities(said: Judged | None, number: int) -> dict[str, float] | None:
    rows = np.flatnonzero(said.number == number) if said else np.zeros(0, int)
    if said is None or not len(rows):
        return None
    return dict(zip(said.classes, said.scores[:, rows[0]].mean(0).tolist(), strict=True))


def shared(a: Array, b: Array) -> Array:
    """bool [...]: have two multi-hot rows [..., K] a label in common?"""
    return np.asarray((a.astype(bool) & b.astype(bool)).any(-1))


def chance_of(library: Array, asked: Array) -> Array:
    """Share of all library images that have a label in common with each asked one: uint8 [L, K], [N, K] -> [N]."""
    rows, times = np.unique(library, axis=0, return_counts=True)  # few different rows, however many images
    return np.stack([shared(asked, row) * n for row, n in zip(rows, times, strict=True)]).sum(0) / len(library)


def purity(y: Array, share: Array, weight: Array) -> Array:
    """Mean share [N, 1] of neighbours with the same label, over images."""
    return weight @ share[:, 0] / weight.sum(1)


def balanced_purity(y: Array, share: Array, weight: Array) -> Array:
    """The same as a mean over the classes that occur, y uint8 [N, K]: one large class cannot carry it alone."""
    whole = weight @ y.astype(float)  # [R, K]
    each = np.divide(weight @ (share * y), whole, out=np.full(whole.shape, np.nan), where=whole > 0)
    return np.nanmean(each, axis=1)


PURITY = {"neighbour_purity": purity, "balanced_purity": balanced_purity}


def as_dict(case: Case, seen: Look, index: Index) -> dict[str, Any]:
    near = [{"key": index.key(n), "label": list(classes), "cosine": cosine} for n, classes, cosine in case.near]
    return {
        "key": case.key,
        "label": list(case.classes),
        "probabilities": case.said,
        "neighbours": near,
        "attention": seen.attention is not None,
        "compared_with": seen.why or None,
    }


def show(about: dict[str, Any], figures: dict[str, Interval], path: Path) -> None:
    console = Terminal()
    for case in about["detail"]["cases"]:
        near = ", ".join(f"{'|'.join(n['label'])} {n['cosine']:.2f}" for n in case["neighbours"])
        console.print(f"{case['key']} ({'|'.join(case['label']) or 'unlabelled'}): {near}")
    for name, m in figures.items():
        console.print(f"{name} {m}, by chance {about['detail']['chance'][name]:.3f}")
    for note in about["notes"]:
        console.print(f"note: {note}")
    console.print(f"written: {path} and report.html", soft_wrap=True)
