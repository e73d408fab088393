"""The page of `python -m shards audit`: what was found first, with pictures, then what the set consists of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.audit_pictures import HOW, Pictures, cell, how, show
from hybridssl.page import Markup, Page
from shards.audit import Audit

GROUPS, SINGLE = 12, 12  # shown a section: groups, and pictures that stand alone
ROWS = 20  # of a table


def write(found: Audit, path: Path) -> Path:
    """Write the page of an audit to `path`, beside its audit.json."""
    about = found.document
    page = Page("Audit", f"{about['index']['name']}, {about['index']['samples']:,} images")
    page.answer(answer(about))
    page.text(Markup('Every finding, by key, is in <a href="audit.json">audit.json</a>.'))
    if about["index"]["synthetic"]:
        page.note("The images are synthetic, drawn by a program.", "warn")
    page.facts(_facts(about))
    pictures = Pictures(found.index)
    _leaks(page, found)
    _copies(page, about, pictures)
    _crossing(page, about, pictures)
    _damaged(page, about, pictures)
    _rims(page, about, pictures)
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
        f"{leak['samples']:,} of {_count(total, 'image')} {_are(leak['samples'])} also in {leak['index']}"
        for leak in about["findings"]["against"]
    ]
    dropped = len(about["drop"])
    kind = "a redundant copy" if dropped == 1 else "redundant copies"
    parts.append(f"{dropped:,} of {_count(total, 'image')} {_are(dropped)} {kind}" if copies else "no image is a copy")
    across = sum(group["across_splits"] for group in copies)
    parts += [f"copies of {_count(across, 'picture')} lie in more than one split"] if across else []
    people = _count(crossing, "patient or lesion has", "patients or lesions have")
    parts += [f"{people} images in more than one split"] if crossing else []
    conflicts = sum(group["label_conflict"] for group in copies)
    parts += [f"copies of {_count(conflicts, 'picture')} carry labels that contradict each other"] if conflicts else []
    parts += [f"{_count(unreadable, 'image')} cannot be read"] if unreadable else []
    told = [row["factor"] for row in about["findings"]["confounding"] if row["shown"]]
    parts += [f"the label can be guessed, better than by chance, from {_listed(told)}"] if told else []
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _count(number: int, one: str, more: str = "") -> str:
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


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
            rows.append([
                cell(found.index, a, _in("this set", pair["split"])),
                cell(other, b, _in(name, pair["other_split"]), how(pair)),
            ])  # fmt: skip
        page.text(_shown(len(rows), len(pairs), "pairs, the least certain first"))
        show(page, rows)


def _copies(page: Page, about: dict[str, Any], pictures: Pictures) -> None:
    groups = about["findings"]["duplicates"]
    page.section(
        "Copies",
        "Pictures that are there more than once. The first of each group is kept; the others are what audit.json lists "
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
            show(page, [pictures.of_group(g) for g in some[:GROUPS]])


def _crossing(page: Page, about: dict[str, Any], pictures: Pictures) -> None:
    crossing = about["findings"]["groups_across_splits"]
    if not crossing:
        return
    page.section("Patients or lesions in more than one split", "A test on them is not a test.")
    page.text(_shown(min(GROUPS, len(crossing)), len(crossing), "groups"))
    rows = []
    for by_split in crossing[:GROUPS]:
        rows.append([pictures.of_key(key, split) for split, keys in by_split.items() for key in keys[:2]])
    show(page, rows)


def _damaged(page: Page, about: dict[str, Any], pictures: Pictures) -> None:
    unreadable, constant = about["findings"]["unreadable"], about["findings"]["constant"]
    if not unreadable and not constant:
        return
    page.section("Unreadable, or of one colour")
    if unreadable:
        page.table(["image", "why it cannot be read"], [[row["key"], row["reason"]] for row in unreadable[:ROWS]])
        page.text(_shown(min(ROWS, len(unreadable)), len(unreadable), "unreadable images"))
    if constant:
        page.text(_shown(min(SINGLE, len(constant)), len(constant), "images of one colour"))
        show(page, [[pictures.of_key(key)] for key in constant[:SINGLE]])


def _rims(page: Page, about: dict[str, Any], pictures: Pictures) -> None:
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
        show(page, [[pictures.of_key(key)] for key in some])


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


def _in(name: str, split: str) -> str:
    return f"{name}, {split}" if split else name


def _shown(shown: int, total: int, what: str) -> str:
    what = re.sub(r"\b(image|group|pair)s\b", r"\1", what, count=1) if total == 1 else what
    return f"{total:,} {what}." if shown == total else f"{shown:,} of {total:,} {what}."
