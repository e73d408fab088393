"""What only the owner can say of an exported backbone, and its evaluations, for the model card and its metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hybridssl.errors import UserError

TAGS = ("timm", "transformers", "image-feature-extraction", "self-supervised", "medical-imaging")
# Identifiers that the hub knows (https://huggingface.co/docs/hub/repositories-licenses); others go under their name.
KNOWN_LICENSES = frozenset(
    [
        "afl-3.0",
        "agpl-3.0",
        "apache-2.0",
        "artistic-2.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "bsl-1.0",
        "c-uda",
        "cc",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nd-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc0-1.0",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "isc",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "mit",
        "mpl-2.0",
        "ms-pl",
        "ncsa",
        "odbl",
        "openrail",
        "osl-3.0",
        "other",
        "pddl",
        "unknown",
        "unlicense",
        "wtfpl",
        "zlib",
    ]
)
SHOWN = 6  # metrics a protocol: the one that it selects by comes first
Result = Mapping[str, Any]  # a results.json of `python -m finetune`


@dataclass(frozen=True)
class Stated:
    """All of it goes into a public card, so nothing here may name a patient."""

    license: str = ""  # of the weights; "": none stated
    datasets: tuple[str, ...] = ()  # hub ids of the training data
    data_licenses: tuple[str, ...] = ()  # of the training data, in plain words
    tags: tuple[str, ...] = ()
    results: Mapping[str, Sequence[Result]] = field(default_factory=dict)  # folder -> what `finetune` left there

    def __post_init__(self) -> None:
        for name in self.datasets:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII):
                raise UserError(
                    f"--dataset {name!r} is no hub id: write NAME or ORG/NAME; plain words go to --data-license"
                )

    def of(self, sha256: str) -> list[Result]:
        """The results that belong to the weights with this digest. UserError for a folder that has none of them."""
        for folder, found in self.results.items():
            if not any(result["backbone"]["sha256"] == sha256 for result in found):
                others = ", ".join(dict.fromkeys(str(result["backbone"]["name"]) for result in found))
                raise UserError(
                    f"--results {folder} holds results of {others}: other weights than these (sha256 {sha256[:12]}); "
                    "evaluate this checkpoint, or name the folder of its own results"
                )
        mine = (r for found in self.results.values() for r in found if r["backbone"]["sha256"] == sha256)
        return [r for r in mine if r["data"].get("splits", {}).get("test")]  # drift, say, judges no backbone


def metadata(stated: Stated, results: Sequence[Result]) -> str:
    """The hub's metadata of a card as YAML, by huggingface_hub's own writer."""
    known = (stated.license or "unknown").lower()
    named = known in KNOWN_LICENSES
    scores = [(result, name, row) for result in results for name, row in figures(result)]
    data = ModelCardData(
        license=known if named else "other",
        license_name=None if named else _slug(stated.license),
        library_name="timm",
        pipeline_tag=TAGS[2],
        tags=list(dict.fromkeys((*TAGS, *(" ".join(tag.split()) for tag in stated.tags)))),
        datasets=list(stated.datasets) or None,
        metrics=list(dict.fromkeys(name for _, name, _ in scores)) or None,
        model_name="backbone" if scores else None,
        eval_results=[_score(*score) for score in scores] or None,
    )
    return data.to_yaml()


def figures(result: Result) -> Iterator[tuple[str, Mapping[str, float]]]:
    """(name, value with low and high) of the metrics that a card shows; those that are not numbers are left out."""
    chosen = str(result["selected"].get("by", "")) if isinstance(result["selected"], Mapping) else ""
    names = sorted(result["metrics"], key=lambda name: name != chosen)  # stable: the others keep their order
    whole = [(n, result["metrics"][n]) for n in names if None not in result["metrics"][n].values()]
    yield from whole[:SHOWN]


def judged_on(result: Result) -> str:
    """The name of the evaluation set: the last part of its folder, as other parts may tell of a hospital."""
    return PurePath(str(result["data"].get("index") or "").partition("?")[0]).name or "not named"


def _score(result: Result, name: str, row: Mapping[str, float]) -> EvalResult:
    segments = "segment" in result["protocol"]
    return EvalResult(
        task_type="image-segmentation" if segments else "image-classification",
        dataset_type=_slug(judged_on(result)),
        dataset_name=judged_on(result),
        dataset_split="test",
        metric_type=name,
        metric_name=f"{name} ({result['protocol']}, {result['data']['labels']:.0%} of the labels)",
        metric_value=round(row["value"], 4),
        metric_args={"low": round(row["low"], 4), "high": round(row["high"], 4)},  # the 95 % interval
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", "-", text.lower()).strip("-.") or "other"
