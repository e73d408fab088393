"""How many labels does it take? Every method, taught by a growing share of the labels, as curves with bands.

Shares of the train labels (whole patients or lesions) x methods x seeds x backbones. It shows where a probe stops
gaining, whether adapting the backbone pays and from how many labels on, and whether one backbone needs fewer labels
than another for the same figure (as in 2508.04441). Name the floor with it: --also random:SPEC histogram.

Every cell (backbone, share, method) is a result of its own under OUT/scaling/cells, which `report` and `compare` read
like any other. A run that was cut off, or is asked for more shares or methods, computes only the cells it lacks.

  python -m finetune scaling --backbone models/derm-s --also random:models/derm-s histogram --data data/derm \\
      --shares 0.01 0.1 1 --methods knn logistic --seeds 0 1 2 --out results/derm
"""

from __future__ import annotations

import argparse
import re
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune import adapt, heads, options, results, scaling_page, task, ways, written
from finetune.resample import Draws, enough, holm, mean_of_drawn, resample
from finetune.results import Result
from finetune.task import Task
from hybridssl.errors import UserError
from shards.terminal import Terminal

Array = np.ndarray
SHARES = (0.001, 0.01, 0.1, 1.0)
USUAL = ("knn", "logistic", "linear", "adapt-full", "adapt-lora")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    add = parser.add_argument
    add("--also", nargs="+", default=[], metavar="SPEC", help="further backbones for the same picture")
    add("--shares", type=float, nargs="+", default=list(SHARES), metavar="F", help=f"shares of the labels {SHARES}")
    add(
        "--methods",
        nargs="+",
        choices=ways.METHODS,
        default=list(USUAL),
        metavar="M",
        help=f"of {', '.join(ways.METHODS)}",
    )
    adapt.add_training_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if args.labels != 1:
        raise UserError("scaling draws its own shares of the labels: say --shares, not --labels")
    if not all(0 < share <= 1 for share in args.shares):
        raise UserError(f"--shares {min(args.shares)} ... {max(args.shares)} must be above 0 and at most 1")
    settings = {method: ways.settings(args, method) for method in args.methods}
    shares = sorted(set(args.shares))
    backbones = list(dict.fromkeys([args.backbone, *args.also]))
    cells, skipped, first = [], [], None
    for spec in backbones:
        size = None if spec == "histogram" else args.size  # --size is for those beside it
        own = Namespace(**{**vars(args), "backbone": spec, "size": size})
        work = task.prepare(own, [] if first else ["scaling"])
        first = first or work
        methods, refused = ways.possible(args.methods, work.encoder)
        skipped += refused
        wanted = [(share, method) for share in shares for method in methods]
        known = {at: kept(work, *at, settings[at[1]]) for at in wanted}
        for n, (share, method) in enumerate(wanted, 1):
            found = known[share, method]
            state = "kept" if found else "at work"
            Terminal().print(f"{spec}, cell {n} of {len(wanted)}: {method}, {share:.3g} of the labels: {state}")
            cells.append(found or compute(work, share, method, settings[method], args))
    assert first is not None
    write(first, cells, skipped)


def folder_of(work: Task, share: float) -> Path:
    """Where the cells of a backbone and a share lie. The name is for people, the digest tells backbones apart."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(work.encoder.name).name).strip("-.")
    return work.args.out / "scaling" / "cells" / f"{name}-{work.encoder.sha256[:8]}" / f"{share:g}"


def kept(work: Task, share: float, method: str, settings: dict[str, Any]) -> Result | None:
    """The cell as an earlier run left it. UserError when it is there with other settings and may not be replaced."""
    path = folder_of(work, share) / method / "results.json"
    if not path.is_file():
        return None
    found = results.read(path)
    about = work.about(method)
    about["data"]["labels"] = share
    same = (
        found.identity() == results.identity(about)
        and found.about["seeds"] == about["seeds"]
        and found.about.get("task") == about["task"]
        and found.about["leaks"] == about["leaks"]
        and found.about.get("detail", {}).get("settings") == settings
    )
    if not same and not work.args.overwrite:
        raise UserError(f"{path} was made with other settings or seeds: choose another --out, or --overwrite")
    return found if same else None


def compute(work: Task, share: float, method: str, settings: dict[str, Any], args: Namespace) -> Result:
    """One cell: every seed draws its own share of the labels, chooses on val and is judged on test."""
    own = Namespace(**{**vars(work.args), "labels": share, "out": folder_of(work, share)})
    cell = replace(work, args=own, since=time.monotonic())
    scores, val_scores, choices = [], [], []
    parameters = None
    for seed in args.seeds:
        train, val = cell.split(seed)
        taught = ways.teach(cell, method, args, train, val, seed)
        scores.append(taught.predict(work.test))
        val_scores.append(taught.predict(val))
        choices.append(taught.choice)
        parameters = taught.parameters
    detail = {"settings": settings, "parameters": parameters}
    grid = heads.weighed(settings, method, work.kind)  # `settings` are also what a cell is recognised by, in `kept`
    return results.read(cell.finish(method, scores, choices, grid, val_scores, detail=detail))


def write(work: Task, cells: list[Result], skipped: list[str]) -> None:
    """OUT/scaling/results.json, a row a cell, and the page."""
    compared = pairs(cells)
    metric, draws = work.kind.select_by, draws_of(cells, work, enough(len(compared)))
    rows = [row_of(cell, drawn, each, work) for cell, (drawn, each) in zip(cells, draws, strict=True)]
    found, choices, grid = {}, [], {}
    for cell, row, (drawn, _) in zip(cells, rows, draws, strict=True):
        found[f"{metric}@{row['share']:g}, {row['method']}, {row['backbone']}"] = drawn.interval
        choices += [{"cell": row["result"], **choice} for choice in cell.about["selected"]["choices"]]
        grid[row["method"]] = cell.about["selected"]["grid"]
    labels = {side: [n for cell in cells for n in cell.about["cost"]["labels_used"][side]] for side in ("train", "val")}
    own = {note for cell in cells for note in task.rich_val(cell.about["cost"]["labels_used"])}  # said once, of all
    notes = [*dict.fromkeys(note for cell in cells for note in cell.about["notes"] if note not in own), *skipped]
    notes += task.rich_val(labels)
    if len(work.args.seeds) == 1:
        notes.append("one seed: the bands do not hold the luck of which labels are drawn; add --seeds 0 1 2 3 4")
    arrays = {"drawn": np.stack([drawn.drawn for drawn, _ in draws]), "number": work.features.numbers[work.test]}
    differences = paired(rows, [drawn for drawn, _ in draws], compared)
    said = scaling_page.said(differences, rows, metric, len(work.args.seeds))
    detail = {"metric": metric, "rows": rows, "paired": differences, "said": said}
    selected = {"grid": grid, "choices": choices}
    result = written.write(work, "scaling", found, selected, labels, arrays, notes, detail=detail)
    Terminal().print(f"page: {scaling_page.page(result)}", soft_wrap=True)


def draws_of(cells: list[Result], work: Task, resamples: int) -> list[tuple[Draws, list[float]]]:
    """Of every cell the metric that chooses: its mean over the seeds, on resampled groups and seeds, and each seed's.

    The same groups and seeds are drawn for all cells (`resample.mean_of_drawn`): differences are paired in both.
    """
    metric, statistics = work.kind.metrics[work.kind.select_by], {}
    for n, cell in enumerate(cells):
        kept = cell.predictions()
        for s, run in enumerate(kept["scores"].astype(np.float64)):
            statistics[f"{n} {s}"] = lambda weight, y=kept["y"], run=run: metric(y, run, weight)
    group, seeds = work.features.group[work.test], len(work.args.seeds)
    draws = resample(statistics, group, resamples, doing=f"resampling {len(cells):,} cells")
    found = []
    for n in range(len(cells)):
        own = [draws[f"{n} {s}"] for s in range(seeds)]
        found.append((mean_of_drawn(own), [draw.value for draw in own]))
    return found


def row_of(cell: Result, drawn: Draws, each: list[float], work: Task) -> dict[str, Any]:
    about, used = cell.about, cell.about["cost"]["labels_used"]["train"]
    return {
        "backbone": about["backbone"]["name"],
        "baseline": about["backbone"]["baseline"],
        "method": cell.protocol,
        "share": about["data"]["labels"],
        "labels": round(float(np.mean(used)), 1),
        **heads.as_dict(drawn.interval),
        "seeds": each,
        "seconds": about["cost"]["seconds"],
        "parameters": (about["detail"]["parameters"] or {}).get("trainable"),
        "result": cell.path.relative_to(work.args.out / "scaling").as_posix(),
    }


def pairs(cells: list[Result]) -> list[tuple[int, int]]:
    """Positions of the cells that are compared: at every share each method with the first one on the same backbone, and
    the first backbone with each other by the same method."""
    keys = [(cell.about["backbone"]["name"], cell.protocol, cell.about["data"]["labels"]) for cell in cells]
    at = {key: n for n, key in enumerate(keys)}
    backbone, method, _ = keys[0]
    found = []
    for (name, how, share), n in at.items():
        others = {(name, method, share)} if how != method else set()
        others |= {(backbone, how, share)} if name != backbone else set()
        found += [(n, at[other]) for other in sorted(others & at.keys())]
    return found


def paired(rows: list[dict[str, Any]], draws: list[Draws], compared: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """The first of each of `pairs` less the second. p is adjusted for the number of all these comparisons (Holm)."""
    found = []
    for a, b in compared:
        one, other, gap = rows[a], rows[b], draws[a] - draws[b]
        names = {"a": [one["backbone"], one["method"]], "b": [other["backbone"], other["method"]]}
        found.append({"share": one["share"], **names, **heads.as_dict(gap.interval), "p": gap.p})
    for entry, p in zip(found, holm([entry["p"] for entry in found]), strict=True):
        entry["p_holm"] = p
    return found
