"""Who reads what others wrote, and how such a thing is spoilt: for tests/security/test_fuzz.py, with a small budget,
and for benchmarks/reliability.py, which counts.

A check returns what the reader made of its input, "read" or "refused" (an error of ours that names the file, or for
words of a command line the key). Anything else that happens is a fault.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as fix_seed
from hypothesis import strategies as st
from torch import nn

from finetune import report, results, studies
from hybridssl import checkpoint, run
from hybridssl.backbone import BackboneOptions, build
from hybridssl.errors import UserError
from hybridssl.recipe import differences, to_dict, to_yaml
from pretrain.command import load
from pretrain.recipe import RECIPES
from shards import scan
from shards.errors import DataError
from shards.format import decode, decode_mask
from shards.index import Index
from shards.stream import Order, SampleDataset, StreamOptions
from tests.shards.test_fuzz import (
    PICTURES,
    TAR,
    VALUES,
    claims_much,
    damage,
    forged,
    replaced,
    tar_of,
)

Check = Callable[[Any], str]


@dataclass(frozen=True)
class Target:
    """One reader with one way to spoil its input."""

    inputs: Any  # a hypothesis strategy
    check: Check


def verdict(work: Callable[[], object], *names: str) -> str:
    """`names`: one of them is in the message of whoever refuses."""
    try:
        work()
        return "read"
    except (UserError, DataError) as error:
        said = str(error)
    assert not names or any(name in said for name in names), f"no name in: {said}"
    assert len(said) < 4_000
    return "refused"


# ----------------------------------------------------------------------------------------------- shards and their index


def check_tar(data: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.tar").write_bytes(data)
        return verdict(lambda: stream(scan.write(folder)), "x.tar", "tars of", folder, "sample")


def stream(index: Index) -> None:
    """As training reads it: the order, a decoded sample, its labels and columns."""
    if any(claims_much(index.read(i).image) for i in range(min(len(index), 10))):
        return  # a size near the bound is slow to decode; tests/shards/test_fuzz.py looks at memory
    order = Order(index, index.select(None), StreamOptions(labelled_fraction=0.5 if index.classes else 0.0))
    dataset = SampleDataset(index, order, lambda sample, image, *_: [index.classes.index(n) for n in sample.labels])
    for position in range(4):
        dataset[position]


def check_index(name: str) -> Check:
    def check(data: bytes) -> str:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "x.tar").write_bytes(TAR)
            scan.write(folder)
            (Path(folder) / name).write_bytes(data)
            return verdict(lambda: stream(Index.open(folder)), folder, "sample")

    return check


def small(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.tar").write_bytes(TAR)
        scan.write(folder)
        return (Path(folder) / name).read_bytes()


def check_image(data: bytes) -> str:
    found = {verdict(lambda read=read: read(data)) for read in (decode, decode_mask)}
    return "read" if "read" in found else "refused"


def spoilt_row() -> Any:
    row = {"label": ["x"], "source": "s", "group": "g", "split": "train", "meta": {"age": 3}}
    return replaced(row).map(lambda tree: tar_of({"a.jpg": PICTURES["jpeg"], "a.json": json.dumps(tree).encode()}))


# -------------------------------------------------------------------------------------------------- recipes and studies

DEMO = (RECIPES / "demo.yaml").read_bytes()
STUDY = (studies.STUDIES / "cxr-transfer.yaml").read_bytes()
KEYS = ["steps", "seed", "name", "batch.size", "views.global_scale", "optim.lr", "backbone.args", "data.splits"]
KEYS += [
    "objectives.dino",
    "objectives",
    "stream.weights",
    "backbone",
    "text.templates",
    "views.local_count",
    "teacher",
]
PIECES = [
    "&a",
    "*a",
    "[",
    "]",
    "{",
    "}",
    ":",
    ",",
    "-",
    "!!python/name:x",
    "!",
    "|",
    ">",
    "'",
    '"',
    "1e309",
    ".nan",
    "~",
]
PIECES += [
    "2026-13-45",
    "0o9",
    "0x",
    "1_0",
    "<<",
    "?",
    "#",
    "\n",
    " ",
    "true",
    "no",
    "null",
    "\t",
    "\x00",
    "é",
    "\ud800",
]


def check_words(words: list[str]) -> str:
    base = ["recipe=demo", "data.train=d", "out=o"]
    return verdict(lambda: to_yaml(load([*base, *words])))


def check_recipe(data: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_bytes(data)
        return verdict(lambda: to_yaml(load([f"recipe={path}", "data.train=d", "out=o"])))


def check_study(data: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_bytes(data)

        def work() -> None:
            study = studies.read(str(path))
            given = [f"{key}=a" for key in study.arguments]
            studies.plan(study, studies.fill(study, given), Path(folder))

        return verdict(work)


# -------------------------------------------------------------------------------------------------------------- results

RESULT = {
    "format": results.FORMAT,
    "version": results.VERSION,
    "protocol": "logistic",
    "task": {"kind": "one-of", "select_by": "balanced_accuracy"},
    "backbone": {"name": "models/a", "sha256": "ab", "baseline": False, "dim": 24, "input_size": 32},
    "data": {
        "index": "data/a",
        "sha256": "cd",
        "synthetic": False,
        "source": None,
        "labels": 1.0,
        "splits": {"train": 10, "test": 5},
        "groups": {"train": 8, "test": 4},
        "group_column": "group",
        "classes": {"mel": {"train": 5, "test": 2}, "nv": {"train": 5, "test": 3}},
        "bad": [],
    },
    "seeds": [0],
    "leaks": {"pretraining": 0, "groups": 0, "images": 0, "allowed": False},
    "selected": {"split": "val", "by": "balanced_accuracy", "grid": {"C": [1]}, "choices": [{"seed": 0, "C": 1.0}]},
    "cost": {"seconds": 1.5, "labels_used": {"train": [10], "val": [3]}, "peak_memory_mb": 100.0},
    "notes": ["a note"],
    "detail": {"said": ["It is 0.5 [0.4, 0.6].", "Not shown: more."]},
    "metrics": {"balanced_accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}},
}


def check_result(data: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("a", json.dumps(RESULT).encode()), ("b", data)):
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "results.json").write_bytes(text)

        def work() -> None:
            found = report.order(results.find([Path(folder)]))
            report.page(found, Path(folder) / "r.html", "t").write(Path(folder) / "r.html")
            report.as_csv(found)

        return verdict(work, "results.json")


# ---------------------------------------------------------------------------------------------------------- checkpoints

CHECKPOINT = Path(tempfile.mkdtemp(prefix="fuzz-"))


class _Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        options = BackboneOptions(
            "vit_tiny_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": 8}
        )
        self.backbone = build(options, 3, 32)
        self.options = options


def written() -> dict[str, Any]:
    """A whole checkpoint in CHECKPOINT; returns its state.json."""
    model, teacher = _Holder(), _Holder()
    about = {"options": to_dict(model.options), "channels": 3, "image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    data = {"index": "i", "index_sha256": "s", "splits": ["train"], "samples": 1, "sources": [], "classes": []}
    recipe = {"seed": 0, "steps": 3, "name": "x", "data": {"train": "d"}}
    state = run.RunState(3, 96, recipe, about, {**data, "synthetic": True})
    checkpoint.save(CHECKPOINT, state, model, teacher, torch.optim.AdamW(model.parameters()))
    return json.loads((CHECKPOINT / "checkpoints" / "step-3" / "state.json").read_text())


STATE = written()


def check_state(data: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(CHECKPOINT / "checkpoints", Path(folder) / "checkpoints")
        (Path(folder) / "checkpoints" / "step-3" / "state.json").write_bytes(data)

        def work() -> None:
            state = run.read_state(folder)
            differences(state["recipe"], STATE["recipe"])
            run.load_backbone(folder)

        with contextlib.redirect_stderr(io.StringIO()):  # where a damaged checkpoint is named
            return verdict(work, folder)


def spoilt(tree: Any) -> Any:
    """As JSON: another value somewhere, or damaged bytes."""
    return replaced(tree).map(lambda other: json.dumps(other).encode()) | damage(json.dumps(tree).encode())


TARGETS: dict[str, Target] = {
    "index.json": Target(damage(small("index.json")), check_index("index.json")),
    "index.json, values": Target(
        replaced(json.loads(small("index.json"))).map(lambda tree: json.dumps(tree).encode()), check_index("index.json")
    ),
    "index.safetensors": Target(damage(small("index.safetensors")), check_index("index.safetensors")),
    "tar": Target(damage(TAR), check_tar),
    "tar, headers": Target(forged(), check_tar),
    "tar, rows": Target(spoilt_row(), check_tar),
    "image": Target(
        st.sampled_from(sorted(PICTURES))
        .flatmap(lambda name: damage(PICTURES[name]))
        .filter(lambda d: not claims_much(d)),
        check_image,
    ),
    "recipe, words": Target(
        st.lists(
            st.tuples(
                st.sampled_from(KEYS) | st.text(max_size=8),
                st.text(max_size=12) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | VALUES.map(repr),
            ).map("=".join),
            min_size=1,
            max_size=3,
        ),
        check_words,
    ),
    "recipe, file": Target(damage(DEMO), check_recipe),
    "study": Target(damage(STUDY), check_study),
    "results.json": Target(spoilt(RESULT), check_result),
    "state.json": Target(spoilt(STATE), check_state),
}


def attempt(name: str, examples: int, seed: int | None = None) -> Counter[str]:
    """So many inputs at a target: {outcome: count}. Raises what a reader raised that it should not, with the input."""
    target, outcomes = TARGETS[name], Counter[str]()

    def one(value: Any) -> None:
        outcomes[target.check(value)] += 1

    how = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    work = how(given(target.inputs)(one))
    (work if seed is None else fix_seed(seed)(work))()
    return outcomes
