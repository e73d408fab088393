"""What `drift` and `select` share: a backbone, an index that may have no label, and the document of their result."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from finetune import options
from finetune.backbones import load
from finetune.encoder import Encoder
from finetune.features import Features, default_cache, extract
from finetune.splits import Leaks
from finetune.task import device_of, peak_mb
from shards.address import public
from shards.index import Index
from shards.terminal import Terminal

Array = np.ndarray


def add_arguments(parser: argparse.ArgumentParser, data: str) -> None:
    """The options of both; data: what --data is here."""
    options.judged_arguments(parser, data, "DIR/VERB/ with results.json and report.html")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of every random draw (0)")
    options.machine_arguments(parser)


def open_encoder(args: argparse.Namespace) -> Encoder:
    return load(args.backbone, seed=args.seed, device=device_of(args.device), size=args.size)


def features_of(args: argparse.Namespace, encoder: Encoder, index: Index, numbers: Array) -> Features:
    """As features.extract; images that do not decode are named on the terminal."""
    found = extract(encoder, index, numbers, args.batch, args.workers, args.cache or default_cache())
    for entry in found.bad:
        Terminal(stderr=True).print(f"left out: {entry['key']} in {entry['shard']}: {entry['reason']}")
    return found


def in_splits(index: Index, splits: tuple[str, ...]) -> Array:
    """int64 numbers of the samples in these splits; none, where the index has no such split."""
    wanted = [k for k, name in enumerate(index.splits) if name in splits]
    return np.flatnonzero(np.isin(index.column("split"), wanted)).astype(np.int64)


def about(protocol: str, encoder: Encoder, index: Index, path: Path, parts: dict[str, Features]) -> dict[str, Any]:
    """The head of results.json. path: of `index`, as it was named; parts: what was looked at of it, by name."""
    looked = np.concatenate([part.numbers for part in parts.values()])
    return {
        "protocol": protocol,
        "backbone": encoder.about(),
        "data": {
            "index": public(str(path)),
            "sha256": index.sha256,
            "synthetic": index.synthetic,
            "source": None,
            "labels": 0.0,
            "splits": {name: len(part) for name, part in parts.items()},
            "groups": {name: len(np.unique(part.group)) for name, part in parts.items()},
            "group_column": "group" if (index.column("group")[looked] != 0).any() else None,
            "classes": {},
            "bad": [entry for part in parts.values() for entry in part.bad],
        },
        "leaks": Leaks(None, 0, 0).as_dict(),
    }


def cost(started: float, labels: int = 0) -> dict[str, Any]:
    used = {"train": [labels], "val": [0]}
    return {"seconds": round(time.monotonic() - started, 2), "labels_used": used, "peak_memory_mb": peak_mb()}
