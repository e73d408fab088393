"""The model card (README.md) of an exported backbone. All that comes from data or users is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hybridssl.card_code import codes
from hybridssl.recipe import to_yaml
from hybridssl.stated import Result, Stated, figures, judged_on, metadata

LIMITS = """\
A feature extractor for research: linear probes, nearest neighbours, fine-tuning, segmentation heads.

**It is not a medical device** and has no clearance for diagnosis or treatment. Features inherit what the training
images have and lack: hospitals, devices, skin tones, ages and diseases that are rare there are represented worse.
Before any use, evaluate it on your own patients, by subgroup, with intervals, on patients that pretraining has not seen
(`pretraining.safetensors`, where present, holds digests of the images that it was given, to check for leaks).
"""
UNJUDGED = """\
None is stated here. A backbone whose features nobody has judged on patients that it has not seen is not ready for use.
"""
PARITY = """\
The same random images through the backbone as trained and through this folder: largest absolute difference over all
features, float32, at the training size and at a larger oblong one.
"""


def escape(text: object) -> str:
    """One line of plain text that neither Markdown nor HTML reads as markup."""
    line = " ".join(str(text).split())
    return re.sub(r"""[\\`*_\[\]{}()#|!~$:@<>&"']""", lambda m: f"&#{ord(m[0])};", line)


def listed(values: Sequence[str], otherwise: str, most: int = 50) -> str:
    """Escaped values in a row, the tail of a long row counted."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(escape(v) for v in values[:most]) + more or otherwise


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def card(
    name: str,
    config: Mapping[str, Any],
    prefix: int,
    about: Mapping[str, Any],
    which: str,
    parity: Mapping[str, float],
    stated: Stated,
    results: Sequence[Result] = (),
) -> str:
    """The text of README.md.

    config: config.json; prefix: tokens before the patches, 0 for a convolutional network; about: pretraining.json;
    parity: library -> difference, where "onnxruntime" tells that there is a model.onnx; results: of these weights.
    """
    channels, size, _ = config["pretrained_cfg"]["input_size"]
    dim, registers = config["num_features"], f", {prefix - 1} register tokens" if prefix > 1 else ""
    terms = (
        f"Licence: {escape(stated.license)}." if stated.license else "Its owner has stated no licence yet: ask first."
    )
    loading = codes(channels, size, prefix, dim, "onnxruntime" in parity)
    use = "\n".join(f"With {library}:\n\n{fenced(code, 'python')}" for library, code in loading.items())
    return f"""\
---
{metadata(stated, results).rstrip()}
---

# {escape(name)}

A {escape(config["architecture"])} image backbone pretrained with HybridSSL: {dim} features,
{channels} x {size} x {size} px{registers}. {terms}

## What it was trained on

{_data(about, which, stated)}
## Use

{use}
## Intended use and limits

{LIMITS}
## Evaluation

{_evaluation(results) or UNJUDGED}
## Parity

{PARITY}
{_table(("loaded with", "difference"), ((library, f"{far:.1e}") for library, far in parity.items()))}
## Recipe

{fenced(to_yaml(about["recipe"]), "yaml")}"""


def _data(about: Mapping[str, Any], which: str, stated: Stated) -> str:
    splits = [s or "(rows without a split)" for s in about["splits"]]
    rows = [
        ("images", f"{about['samples']:,}"),
        ("presentations of an image", f"{about['images']:,} in {about['step']:,} steps"),
        ("sources", listed(about["sources"], "not stated")),
        ("licences of the data", listed(stated.data_licenses, "not stated")),
        ("splits that were read", listed(splits, "all")),
        ("classes that labels could name", listed(about["classes"], "none")),
        ("weights", escape(which)),
    ]
    for run in about.get("before", ()):
        seen = f"{run['samples']:,} images, sources: {listed(run['sources'], 'not stated')}"
        rows.append((f"before, until step {run['step']:,}", seen))
    synthetic = all(run["synthetic"] for run in (about, *about.get("before", ())))
    kind = "**All of these images are synthetic.** " if synthetic else ""
    nothing = "This folder holds weights, counts and digests; no image, no report, no file name and no patient data."
    return f"{_table(('', ''), rows)}\n{kind}{nothing}\n"


def _evaluation(results: Sequence[Result]) -> str:
    """The figures of these weights with their intervals, and below them what spoils any of them."""
    rows, spoilt = [], []
    for result in results:
        data, leaks = result["data"], result["leaks"]
        on = f"{escape(judged_on(result))}{' (synthetic)' if data.get('synthetic') else ''}"
        on += f", {data['splits']['test']:,} images"
        on += f", {data['groups']['test']:,} groups" if data.get("group_column") else ""
        for name, row in figures(result):
            interval = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            rows.append((escape(result["protocol"]), on, f"{data['labels']:.0%}", escape(name), interval))
        if found := [f"{leaks[key]:,} {what}" for key, what in LEAKS.items() if leaks.get(key)]:
            spoilt.append(f"**{escape(result['protocol'])} on {on} leaks:** {', '.join(found)}.\n")
    if not rows:
        return ""
    intro = (
        "The frozen features as `python -m finetune` judged them, 95 % intervals over groups, or images without them.\n"
    )
    return "\n".join([intro, _table(("protocol", "test set", "labels", "metric", "value"), rows), *spoilt])


LEAKS = {
    "pretraining": "judged images were read in pretraining",
    "groups": "groups are in more than one split, or were read in pretraining",
    "images": "identical images are in more than one split",
}


def _table(head: Sequence[str], rows: Any) -> str:
    """A Markdown table of cells that are escaped already."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
