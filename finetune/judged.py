"""Results that exist, opened for the verbs that judge them without a backbone: `fair`, `calibrate`, `compare`.

Such a verb writes beside what it judged: RESULTS/knn -> RESULTS/fair-sex-knn, so that `report` tables it like any
other protocol. Its results.json keeps what is known of the judged one (backbone, data, seeds, leaks) and names it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from finetune import kinds, results
from finetune.kinds import Kind
from finetune.results import Result
from hybridssl.errors import UserError
from shards.index import Index
from shards.terminal import Terminal

Array = np.ndarray
WHO_DOES = "results of knn, probe, adapt and the like do (if it is one, run it again: an older program wrote it)"


@dataclass(frozen=True)
class Part:
    """Scores of some images with what is known of them."""

    scores: Array  # [M, K] of one seed
    y: Array  # int64 [M], or uint8 [M, K] for several labels an image
    group: Array  # int64 [M]
    number: Array  # int64 [M]: which sample of the index


@dataclass(frozen=True)
class Judged:
    """A result and its predictions on the test images."""

    result: Result
    kind: Kind
    classes: tuple[str, ...]
    scores: Array  # float64 [S, N, K], one a seed
    y: Array  # int64 [N], or uint8 [N, K]
    group: Array  # int64 [N]
    number: Array  # int64 [N]
    val: list[Part]  # one a seed: the images that chose; empty in a result that did not keep them

    @property
    def name(self) -> str:
        return self.result.about["backbone"]["name"]

    def index(self, elsewhere: Path | None = None) -> Index:
        """The index that was evaluated; `elsewhere`: where it lies now. UserError when it is another one."""
        data = self.result.about["data"]
        index = Index.open(elsewhere or data["index"])
        if index.sha256 != data["sha256"]:
            raise UserError(f"{index.root} is not the index that {self.result.path} evaluated: name that with --data")
        return index

    def about(self, protocol: str, started: float, **more: Any) -> dict[str, Any]:
        """The document of a result that judges this one."""
        kept = {name: self.result.about[name] for name in ("task", "backbone", "data", "seeds", "leaks", "selected")}
        cost = {
            "seconds": round(time.monotonic() - started, 2),
            "labels_used": self.result.about["cost"]["labels_used"],
            "peak_memory_mb": None,  # nothing that anyone would have to plan for
        }
        source = {
            "result": str(self.result.path),
            "protocol": self.result.protocol,
            "sha256": sha256(self.result.path.read_bytes()).hexdigest(),
        }
        notes = [*self.result.about.get("notes", []), *more.pop("notes", [])]
        return {"protocol": protocol, **kept, "cost": cost, "judged": source, "notes": notes, **more}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verbs that judge each result by itself."""
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="RESULT", help="folders with results.json in or below them")
    add("--out", type=Path, metavar="DIR", help="where DIR/PROTOCOL/results.json goes; default: beside each RESULT")
    add("--data", type=Path, metavar="DIR", help="where the index lies now, if it was moved since")
    add("--overwrite", action="store_true", help="replace another backbone's result")


class Unfit(UserError):
    """A result in which nothing is missing but what is judged here: its protocol keeps none."""


def find(folders: Iterable[Path], val: bool = False) -> list[Judged]:
    """All results in and below the folders that can be judged; the others are named on the terminal and left out.

    val: only those that hold the scores of val too. UserError when a folder is itself that of another one, or none is
    left."""
    folders, found, left = list(folders), [], []
    named = {(path if path.is_file() else path / "results.json").resolve() for path in folders}
    for result in results.find(folders):
        try:
            found.append(read(result, val))
        except Unfit as error:
            if result.path.resolve() in named:
                raise
            left.append((result, error))
    if not found:
        raise UserError(f"{', '.join(map(str, folders))}: no result there can be judged; {left[0][1]}")
    others = [str(result.path.parent) for result, _ in left if "judged" not in result.about]
    if others:
        what = "of test and val" if val else "of test"
        Terminal().print(f"left out, as they hold no class scores {what}: {', '.join(others)}", soft_wrap=True)
    return found


def read(result: Result, val: bool = False) -> Judged:
    """Unfit when it holds no class scores, or none of val where these are asked for. UserError when the predictions are
    missing, not whole, or older than this program."""
    name, about = f"{result.path} ({result.protocol})", result.about
    if "judged" in about:
        raise Unfit(f"{name} judges another result: name that one")
    if "task" not in about:
        raise UserError(f"{name} does not hold its task: run the evaluation again")
    of_classes = about["task"] is not None and about["task"]["kind"] in kinds.NAMES
    arrays = result.predictions() if of_classes else {}  # masks are large
    if "scores" not in arrays:
        raise Unfit(f"{name} holds no class scores of the test images: {WHO_DOES}")
    if lacking := [part for part in ("y", "group", "number") if part not in arrays]:
        raise UserError(f"{name} does not hold {', '.join(lacking)}: run the evaluation again")
    seeds = [s for s in range(len(arrays["scores"])) if f"val_scores_{s}" in arrays]
    if val and len(seeds) < len(arrays["scores"]):
        raise Unfit(f"{name} holds no scores of val, on which to calibrate: {WHO_DOES}")
    parts = [Part(*(arrays[f"val_{part}_{s}"] for part in ("scores", "y", "group", "number"))) for s in seeds]
    classes, scores = tuple(about["data"]["classes"]), arrays["scores"].astype(np.float64)
    if scores.ndim != 3 or scores.shape[1:] != (len(arrays["y"]), len(classes)):
        raise UserError(
            f"{result.path}: scores {scores.shape} do not fit {len(arrays['y']):,} x {len(classes)} classes"
        )
    y, group, number = (arrays[name] for name in ("y", "group", "number"))
    return Judged(result, kinds.of(about), classes, scores, y, group, number, parts)


def places(found: list[Judged], verb: str, out: Path | None, overwrite: bool) -> list[Path]:
    """A folder for each: OUT/VERB-PROTOCOL. UserError before any work when two meet or one holds something else."""
    folders = [(out or one.result.path.parent.parent) / f"{verb}-{one.result.protocol}" for one in found]
    if len(set(folders)) < len(folders):
        raise UserError(f"several results of one protocol would go to one folder of {out}: leave --out away")
    for one, folder in zip(found, folders, strict=True):
        results.check_room(folder, {**one.result.about, "protocol": folder.name}, overwrite)
    return folders
