"""results.json, the one form in which every protocol reports, with the predictions beside it for paired tests."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from finetune.metrics import Interval
from finetune.shape import check
from finetune.splits import Leaks
from hybridssl.errors import UserError
from hybridssl.files import write_text, writing

FORMAT, VERSION = "hybridssl-results", 1
FIXED = "no split: all was fixed beforehand"  # where nothing is chosen: few labels teach, or none
NEEDED = ("protocol", "backbone", "data", "metrics", "selected", "seeds", "cost", "leaks")


@dataclass(frozen=True)
class Result:
    """One results.json. `about` is the whole document."""

    path: Path
    about: dict[str, Any]

    @property
    def protocol(self) -> str:
        return self.about["protocol"]

    @property
    def metrics(self) -> dict[str, Interval]:
        return {name: interval(row) for name, row in self.about["metrics"].items()}

    @property
    def leaks(self) -> Leaks:
        return Leaks(**self.about["leaks"])

    @property
    def drawn_labels(self) -> bool:
        """Whether its seeds are draws of a part of the labels, whose luck a difference has to outlast."""
        return self.about["data"]["labels"] < 1 and len(self.about["seeds"]) > 1

    def identity(self) -> tuple[Any, ...]:
        return identity(self.about)

    def predictions(self) -> dict[str, np.ndarray]:
        """scores [S, N, K], y [N], group [N], number [N] of the test images. UserError when the file is not there."""
        path = self.path.with_name("predictions.safetensors")
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}): run the evaluation again") from error


def interval(row: Mapping[str, Any]) -> Interval:
    """A figure as the file keeps it, where NaN is null."""
    return Interval(*(math.nan if row[end] is None else float(row[end]) for end in ("value", "low", "high")))


def identity(about: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a second result a repetition of the first, which may replace it."""
    backbone, data = about["backbone"], about["data"]
    seen = backbone["sha256"], backbone.get("input_size")
    return about["protocol"], *seen, data["sha256"], data["labels"], part(data), tuple(data.get("masks") or ())


def part(data: Mapping[str, Any]) -> str:
    """Which images of an index are judged, and by which column; "" for all of them, by their labels."""
    said = {"source": data["source"], "column": data.get("column")}
    return ", ".join(f"{what} {name}" for what, name in said.items() if name)


def labels_alone(about: dict[str, Any]) -> str:
    """How many train labels a result used, where no share of them tells it: it takes a few, or none. "" elsewhere."""
    if not about["selected"]["split"].startswith(FIXED) and about["protocol"] != "efficiency":
        return ""
    used = about["cost"]["labels_used"].get("train") or [0]
    if not max(used):
        return "no train labels"
    return f"{min(used):,}{f' to {max(used):,}' if max(used) > min(used) else ''} train labels"


def check_room(folder: Path, about: dict[str, Any], overwrite: bool) -> None:
    """UserError before any work when `folder` holds another evaluation's result."""
    path = folder / "results.json"
    if not path.exists() or overwrite:
        return
    there = read(path)
    if there.identity() != identity(about):
        backbone, data = there.about["backbone"], there.about["data"]
        size = f" at {backbone['input_size']} px" if backbone.get("input_size") else ""
        masks = f" and the mask classes {', '.join(data['masks'])}" if data.get("masks") else ""
        raise UserError(
            f"{path} holds the result of {backbone['name']}{size} with {data['labels']:.0%} of the labels{masks}: "
            "choose another --out, or --overwrite"
        )


def write(folder: Path, about: dict[str, Any], metrics: dict[str, Interval], **predictions: np.ndarray) -> Path:
    """Write predictions.safetensors, then results.json; each appears whole or not at all. Returns results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "predictions.safetensors.partial"
    with writing(partial):
        save_file({name: np.ascontiguousarray(values) for name, values in predictions.items()}, partial)
    os.replace(partial, folder / "predictions.safetensors")
    rows = {name: {"value": m.value, "low": m.low, "high": m.high} for name, m in metrics.items()}
    document = {"format": FORMAT, "version": VERSION, **about, "metrics": rows}
    path = folder / "results.json"
    write_text(path, json.dumps(_finite(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read(path: Path) -> Result:
    """UserError for a file that is missing, broken, foreign or newer."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(about, ensure_ascii=False).encode()  # half of a pair of surrogates could not be written to a page
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UserError(f"{path} is not a result of `python -m finetune`")
    if not isinstance(about.get("version"), int) or about["version"] > VERSION:
        raise UserError(f"{path} has version {about.get('version')}, this program reads {VERSION}: update it")
    lacking = [name for name in NEEDED if name not in about]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}: it was changed by hand; run the evaluation again")
    check(about, str(path))
    result = Result(path, about)
    try:
        _ = result.identity(), result.metrics, result.leaks
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is not whole ({error!r}): it was changed by hand; run the evaluation again") from error
    return result


def find(folders: Iterable[Path]) -> list[Result]:
    """Every results.json in and below the folders, in the order of their paths. UserError when a folder has none."""
    found: dict[Path, Result] = {}
    for folder in folders:
        paths = [folder] if folder.is_file() else sorted(folder.rglob("results.json"))
        if not paths:
            raise UserError(f"{folder} holds no results.json; `python -m finetune knn` and `probe` write them")
        found |= {path.resolve(): read(path) for path in paths}
    return list(found.values())


def _finite(value: Any) -> Any:
    """NaN and infinity -> null, numpy -> Python: JSON has no word for them."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
