"""The page of `python -m shards audit`: what was found first, with pictures, then what the set consists of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from hybridssl.page import Markup, Page, inline
from hybridssl.pictures import jpeg
from shards.audit import Audit
from shards.errors import DataError
from shards.format import decode
from shards.index import Index

PICTURE, QUALITY = 112, 75  # longest side in pixels and JPEG quality: 3 to 5 KB a picture
GROUPS, A_GROUP, SINGLE = 12, 6, 12  # shown a section: rows, pictures a row, pictures that stand alone
ROWS = 20  # of a table

HOW = {"bytes": "same bytes", "pixels": "same pixels", "near": "near"}


def write(found: Audit, path: Path) -> Path:
    """Write the page of an audit to `path`, beside its audit.json."""
    about = found.document
    page = Page("Audit", f"{about['index']['name']}, {about['index']['samples']:,} images")
    page.answer(answer(about))
    page.text(Markup('Every finding, by key, is in <a href="audit.json">audit.json</a>.'))
    if about["index"]["synthetic"]:
        page.note("The images are synthetic, drawn by a program.", "warn")
    page.facts(_facts(about))
    numbers = _Numbers(found)
    _leaks(page, found)
    _copies(page, about, numbers)
    _crossing(page, about, numbers)
    _damaged(page, about, numbers)
    _rims(page, about, numbers)
    _confounding(page, about)
    _tallies(page, about["tallies"])
    _method(page, about)
    return page.write(path)


def answer(about: dict[str, Any]) -> str:
    """The findings that call for action, in one sentence; the rest of the page is their evidence."""
    copies, total = about["findings"]["duplicates"], about["index"]["samples"]
    unreadable = len(about["findings"]["unreadable"])
    crossing = len(about["findings"]["groups_across_splits"])
    parts = [
        f"{leak['samples']:,} of {total:,} images are also in {leak['index']}" for leak in about["findings"]["against"]
    ]
    parts.append(f"{len(about['drop']):,} of {total:,} images are redundant copies" if copies else "no image is a copy")
    across = sum(group["across_splits"] for group in copies)
    parts += [f"{across:,} pictures lie in more than one split"] if across else []
    parts += [f"{crossing:,} patients or lesions lie in more than one split"] if crossing else []
    conflicts = sum(group["label_conflict"] for group in copies)
    parts += [f"{conflicts:,} pictures carry labels that contradict each other"] if conflicts else []
    parts += [f"{unreadable:,} images cannot be read"] if unreadable else []
    told = [row["factor"] for row in about["findings"]["confounding"] if row["shown"]]
    parts += [f"the label can be guessed, better than by chance, from {_listed(told)}"] if told else []
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _listed(names: Sequence[str]) -> str:
    shown = [*names[:4], *([f"{len(names) - 4} more"] if len(names) > 4 else [])]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def _facts(about: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    findings = about["findings"]
    yield "Images", about["index"]["samples"]
    yield "Redundant copies", len(about["drop"])
    yield "Groups of copies", len(findings["duplicates"])
    yield "Copies across splits", sum(group["across_splits"] for group in findings["duplicates"])
    yield "Label conflicts among copies", sum(group["label_conflict"] for group in findings["duplicates"])
    yield "Patients or lesions across splits", len(findings["groups_across_splits"])
    for leak in findings["against"]:
        yield f"Also in {leak['index']}", leak["samples"]
    yield "Unreadable", len(findings["unreadable"])
    yield "Of one colour", len(findings["constant"])
    yield "With a frame or ring", sum(map(len, findings["rims"].values()))


def _leaks(page: Page, found: Audit) -> None:
    for leak, (other, pairs) in zip(found.document["findings"]["against"], found.others, strict=True):
        name = leak["index"]
        page.section(f"Also in {name}", f"Pictures of this set that {name} holds too, as they are or changed a little.")
        if not len(pairs):
            page.note(f"None of the {found.document['index']['samples']:,} images was found in {name}.", "good")
            continue
        page.note(
            f"{leak['samples']:,} images of this set show {leak['other_samples']:,} images of {name}. A backbone that "
            "was trained on one must not be judged on the other; stream.exclude=audit.json keeps them out of a run.",
            "bad",
        )
        order = np.argsort(pairs.agreement, kind="stable")[:GROUPS]
        rows = []
        for n in order.tolist():
            pair, (a, b) = leak["pairs"][n], (int(pairs.a[n]), int(pairs.b[n]))
            own = _words(pair["key"], pair["split"], found.index.labels(a))
            theirs = _words(pair["other"], pair["other_split"], other.labels(b), _how(pair))
            rows.append([(_picture(found.index, a), own), (_picture(other, b), theirs)])
        page.text(_shown(len(rows), len(pairs), "pairs, the least certain first"))
        page.images(rows, ["this set", name], cell=PICTURE)


def _copies(page: Page, about: dict[str, Any], numbers: _Numbers) -> None:
    groups = about["findings"]["duplicates"]
    page.section(
        "Copies",
        "Pictures that are there more than once. The first of each row is kept; the others are what audit.json lists "
        "under drop, and stream.exclude=audit.json keeps out of a run.",
    )
    if not groups:
        page.note("No picture is there twice.", "good")
        return
    kinds = {how: sum(group["how"] == how for group in groups) for how in HOW}
    page.table(["how sure", "pictures", "copies to drop"], [
        [words, kinds[how], sum(len(g["keys"]) - 1 for g in groups if g["how"] == how)] for how, words in HOW.items()
    ])  # fmt: skip
    chosen = {
        "across splits": [g for g in groups if g["across_splits"]],
        "whose labels contradict each other": [g for g in groups if g["label_conflict"]],
        "the least certain first": sorted(groups, key=lambda g: g["agreement"]),
    }
    for what, some in chosen.items():
        if some:
            page.text(_shown(min(GROUPS, len(some)), len(some), f"groups of copies, {what}"))
            page.images([numbers.row(g) for g in some[:GROUPS]], cell=PICTURE)


def _crossing(page: Page, about: dict[str, Any], numbers: _Numbers) -> None:
    crossing = about["findings"]["groups_across_splits"]
    if not crossing:
        return
    page.section("Patients or lesions in more than one split", "A test on them is not a test.")
    page.text(_shown(min(GROUPS, len(crossing)), len(crossing), "groups"))
    rows = []
    for by_split in crossing[:GROUPS]:
        keys = [(key, split) for split, keys in by_split.items() for key in keys[:2]][:A_GROUP]
        rows.append([numbers.cell(key, split) for key, split in keys])
    page.images(rows, cell=PICTURE)


def _damaged(page: Page, about: dict[str, Any], numbers: _Numbers) -> None:
    unreadable, constant = about["findings"]["unreadable"], about["findings"]["constant"]
    if not unreadable and not constant:
        return
    page.section("Unreadable, or of one colour")
    if unreadable:
        page.table(["image", "why it cannot be read"], [[row["key"], row["reason"]] for row in unreadable[:ROWS]])
        page.text(_shown(min(ROWS, len(unreadable)), len(unreadable), "unreadable images"))
    if constant:
        page.text(_shown(min(SINGLE, len(constant)), len(constant), "images of one colour"))
        page.images(_grid([numbers.cell(key) for key in constant[:SINGLE]]), cell=PICTURE)


def _rims(page: Page, about: dict[str, Any], numbers: _Numbers) -> None:
    rims = {kind: keys for kind, keys in about["findings"]["rims"].items() if keys}
    if not rims:
        return
    page.section(
        "Burnt-in rims",
        "Black or white frames, and the dark ring of a dermatoscope or endoscope. They tell which device took the "
        "picture; whether they also tell the label stands in the next section.",
    )
    for kind, keys in rims.items():
        some = [keys[int(n)] for n in np.unique(np.linspace(0, len(keys) - 1, min(SINGLE, len(keys))))]
        page.text(_shown(len(some), len(keys), f"images with a {kind}"))
        page.images(_grid([numbers.cell(key) for key in some]), cell=PICTURE)


def _confounding(page: Page, about: dict[str, Any]) -> None:
    rows = about["findings"]["confounding"]
    page.section(
        "What predicts the label without the picture",
        "Balanced accuracy of the best guess from each factor alone, one vote a patient or lesion. By chance: the same "
        "with permuted labels, mean and 95th percentile. Clinical columns (age, body site) may well predict; a source, "
        "a device or a rim that does is a shortcut that a model can take, so judge it on other sources.",
    )
    if not rows:
        page.note("Nothing to ask: no labels, or no factor with 2 to 50 values.")
        return
    header = ["factor", "values", "classes", "balanced accuracy", "by chance", "p", "Cramér's V", "mutual information"]
    table = [
        [
            row["factor"],
            row["values"],
            row["classes"],
            f"{row['balanced_accuracy']:.3f}",
            f"{row['by_chance']:.3f}, {row['by_chance_95']:.3f}",
            f"{row['p']:.3f}",
            f"{row['cramers_v']:.2f}",
            f"{row['mutual_information']:.2f}",
        ]
        for row in rows[:ROWS]
    ]
    page.table(header, table, strong=[(n, 3) for n, row in enumerate(rows[:ROWS]) if row["shown"]])
    page.text("Bold: better than chance, corrected for the number of factors (p times their number is at most .05).")


def _tallies(page: Page, tallies: dict[str, Any]) -> None:
    page.section("What the set consists of")
    for name, of in (("classes", "splits"), ("splits", "classes"), ("sources", "classes")):
        counts = tallies[name]
        if not counts:
            continue
        columns = list(dict.fromkeys(column for row in counts.values() for column in row))
        head = [name, *(column or ("unlabelled" if of == "classes" else "(no split)") for column in columns), "all"]
        rows = sorted(((k, r) for k, r in counts.items() if r), key=lambda item: -sum(item[1].values()))
        if len(columns) > ROWS:  # too many classes to stand side by side
            head, columns = [name, "all"], []
        page.table(
            head, [[kind or "(none)", *(r.get(c, 0) for c in columns), sum(r.values())] for kind, r in rows[:ROWS]]
        )
    if tallies["sizes"]:
        short = tallies["sizes"]["short_side"]
        common = [f"{size} ({count:,})" for size, count in list(tallies["sizes"]["common"].items())[:4]]
        page.text(
            f"Short sides from {short[0]:,} to {short[4]:,} px, median {short[2]:,}; {tallies['sizes']['distinct']:,} "
            f"sizes, most often {', '.join(common)}."
        )
    rows = [[name, _column(column), column["missing"]] for name, column in tallies["meta"].items()]
    if rows:
        page.table(["column", "what it holds", "missing"], rows)


def _column(column: dict[str, Any]) -> str:
    if "quartiles" in column:
        low, first, middle, third, high = (f"{q:g}" for q in column["quartiles"])
        return f"{low} to {high}, median {middle}, half from {first} to {third}"
    if "values" not in column:
        return f"{column['distinct']:,} values, so a name rather than a description"
    values = [f"{value} {count:,}" for value, count in list(column["values"].items())[:8]]
    return ", ".join(values) + (f" and {column['distinct'] - 8:,} more values" if column["distinct"] > 8 else "")


def _method(page: Page, about: dict[str, Any]) -> None:
    page.section("What was looked for, and what was not")
    limits = about["thresholds"]
    wide = f" Pairs that the backbone finds alike count from {limits['agreement_wide']}." if about["features"] else ""
    page.text(
        "Every image was decoded. Copies are the same bytes, the same pixels, or near: their hashes differ in at most "
        f"{limits['hash_bits']} of 143 bits in one of eight orientations, whole or cropped, and laid over each other "
        f"their details correlate by {limits['agreement']} or more.{wide}"
    )
    plain = about["findings"]["too_plain_to_compare"]
    page.text(
        "Not found: a lesion photographed anew, crops below about 85 % of a side without --backbone, turns by other "
        f"than right angles. {plain:,} images show too little detail to be compared."
    )


class _Numbers:
    """Sample numbers by key, for pictures with their captions."""

    def __init__(self, found: Audit) -> None:
        self.index = found.index
        self.numbers = {found.index.key(i): i for i in range(len(found.index))}

    def cell(self, key: str, split: str = "", more: str = "") -> tuple[Markup | bytes, Markup]:
        number = self.numbers[key]
        return _picture(self.index, number), _words(key, split, self.index.labels(number), more)

    def row(self, group: dict[str, Any]) -> list[tuple[Markup | bytes, Markup]]:
        rows = list(zip(group["keys"], group["splits"], strict=True))[:A_GROUP]
        cells = [self.cell(key, split, _how(group) if n else "kept") for n, (key, split) in enumerate(rows)]
        left = len(group["keys"]) - len(cells)
        return [*cells, (Markup("<p></p>"), Markup(f"and {left:,} more"))] if left else cells


def _picture(index: Index, number: int) -> Markup | bytes:
    """The whole picture, rims and all, as a small JPEG; what does not decode is a line of text."""
    try:
        image = decode(index.read(number).image, PICTURE, index.channels)
    except DataError:
        return Markup("<p>unreadable</p>")
    scale = PICTURE / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    small = small.reshape(size[1], size[0], -1)
    return jpeg(small[..., :3] if small.shape[2] >= 3 else small[..., :1].repeat(3, axis=2), QUALITY)


def _words(key: str, split: str, labels: Sequence[str], more: str = "") -> Markup:
    lines = [f"<b>{inline('|'.join(labels) or 'unlabelled')}</b>", inline(split), inline(more), inline(key)]
    return Markup("<br>".join(filter(None, lines)))


def _how(found: dict[str, Any]) -> str:
    return f"near, {found['agreement']:.2f}" if found["how"] == "near" else HOW[found["how"]]


def _shown(shown: int, total: int, what: str) -> str:
    return f"{total:,} {what}." if shown == total else f"{shown:,} of {total:,} {what}."


def _grid(cells: list[tuple[Markup | bytes, Markup]]) -> list[list[tuple[Markup | bytes, Markup]]]:
    return [cells[n : n + A_GROUP] for n in range(0, len(cells), A_GROUP)]
