"""report.html of a run: what happened, whether it is healthy, and what the backbone sees. One self-contained file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hybridssl import run as runs
from hybridssl.backbone import BackboneOptions, build
from hybridssl.charts import line_chart
from hybridssl.errors import UserError
from hybridssl.objectives import objective_types
from hybridssl.page import Markup, Page
from hybridssl.recipe import read_yaml, resolve
from pretrain import report_images
from pretrain.alarms import Line, alarms, late, points
from pretrain.meters import flops
from pretrain.pictures import Lens
from pretrain.recipe import DataOptions
from shards.errors import DataError
from shards.index import Index

# Per chart: title, curves (name -> key of metrics.jsonl), and how to read it.
HEALTH = (
    (
        "Target entropy",
        {"of a target": "health/target_entropy", "of the mean target": "health/marginal_entropy"},
        "In nats. How undecided the teacher is about one image: ln K means that it knows nothing; it should leave that "
        "line early and settle below. Stuck there: lower the teacher temperature or take fewer prototypes. The mean "
        "target should stay near ln K; if it falls too, all images get the same target.",
    ),
    (
        "Student-teacher agreement",
        {"": "health/agreement"},
        "Share of images where the student, shown one view, picks the prototype that the teacher picks for the other. "
        "It rises from near 0. Close to 1 with few prototypes in use, the task has become trivial.",
    ),
    (
        "Prototypes in use",
        {"": "health/prototype_usage"},
        "Distinct prototypes that the images of a batch pick, as a share of what they could. A fall towards 0 is "
        "collapse: to the heads all images look the same.",
    ),
    (
        "RankMe",
        {"": "health/rankme"},
        "How many directions the features of a batch really use; never more than it has images. It rises while the "
        "backbone learns. A lasting fall means dying dimensions, often long before a probe shows it.",
    ),
    (
        "Reports found",
        {"": "health/reports_found"},
        "Share of images with a report to which, of all reports of the step, their own is the nearest (objective "
        "text_pairs). It rises from chance; close to 1 early on, the reports are few or give themselves away.",
    ),
    (
        "Labelled by the teacher",
        {"": "health/pseudo_labelled"},
        "Share of the images without a label of whose class the teacher is sure enough (objectives.labels."
        "pseudo_above). It rises as labels are learnt; close to 1 early on, the teacher is too sure.",
    ),
    (
        "Gradient norm",
        {"": "grad_norm"},
        "Before clipping. Single spikes are clipped and harmless; a climb over thousands of steps is not.",
    ),
)
PROBE = (
    (
        "Balanced accuracy",
        {"kNN": "probe/knn", "linear": "probe/linear"},
        "Frozen teacher features on held-out labelled images: 20 nearest neighbours, and a ridge classifier.",
    ),
    (
        "Kept of the start",
        {"kNN": "keep/knn", "linear": "keep/linear"},
        "The same on the general set of probe.keep, from the weights that the run began with (step 0) on. A fall is "
        "what continuing costs: a larger objectives.anchor.weight, a lower rate or backbone.lora holds more.",
    ),
    (
        "RankMe of the probe features",
        {"": "probe/rankme"},
        "As above, on many more images than one batch holds. It should rise, or hold.",
    ),
)
SCHEDULES = (
    ("Learning rate", {"": "lr"}, "Warm-up, then down to its end value."),
    ("Weight decay", {"": "weight_decay"}, "Rises by design in most recipes."),
    ("Teacher momentum", {"": "momentum"}, "The closer to 1, the more steps the teacher averages over."),
    ("Teacher temperature", {"": "temperature"}, "Low makes sharp targets."),
    (
        "Size of the global views",
        {"": "global_size"},
        "In pixels. Where it doubles (views.curriculum), losses and gradients may jump, and steps take longer.",
    ),
    ("Images per second", {"": "images_per_s"}, "Over all processes."),
    (
        "Waiting for data",
        {"": "data_wait"},
        "Share of the time without data. Lastingly above 0.1: more loader workers.",
    ),
    ("TFLOP/s", {"": "tflops"}, "Of one device, by what the method needs: repeated work does not count."),
    ("Share of the device's peak", {"": "mfu"}, "Model FLOPs utilisation, of the bf16 peak that its maker states."),
    ("Memory", {"": "memory_gib"}, "In GiB, the most so far: tensors on the GPU, or the process where there is none."),
)


@dataclass(frozen=True)
class Material:
    """What a run folder offers. What is not there is empty or None, and `missing` says why."""

    path: Path
    recipe: dict[str, Any]
    lines: list[Line]  # metrics.jsonl
    state: dict[str, Any]  # of the newest checkpoint
    lens: Lens | None
    fresh: Lens | None  # the same backbone before training
    index: Index | None
    missing: str


def write(run: Path | str, data: Path | str | DataOptions | None = None) -> Path:
    """Write run/report.html and return its path.

    data: the shard folder whose images are shown; None: the one that the recipe names, of which recipe.yaml tells the
    address without its credentials, and the options of a run that is at hand all. Raises UserError when `run` is no run
    folder. Any other missing part costs its section, and a line says why.
    """
    m = collect(Path(run), data)
    page = Page(m.recipe.get("name") or m.path.name, "Report of a pretraining run")
    _head(page, m)
    _losses(page, m)
    _charts(page, m, "Health", "Collapse shows here first, well before a probe notices.", HEALTH)
    _charts(
        page, m, "Probe over time", "Good for the trend. For figures to report, run an evaluation with finetune.", PROBE
    )
    if m.lens and m.fresh and m.index:
        report_images.samples(page, m.lens, m.fresh, m.index, m.state["data"]["splits"])
    if m.lens:
        report_images.prototypes(page, m.path, runs.latest(m.path), m.state["data"]["classes"])
    _charts(page, m, "Schedules and speed", "", SCHEDULES)
    return page.write(m.path / "report.html")


def collect(path: Path, data: Path | str | DataOptions | None) -> Material:
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is not a run folder: it has no recipe.yaml")
    recipe, missing = read_yaml(path / "recipe.yaml"), ""
    state, lens, fresh, index = {}, None, None, None
    try:
        backbone, state = runs.load_backbone(path)
        about = state["backbone"]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        lens = Lens(backbone.to(device), about["image_size"], about["mean"], about["std"])
        torch.manual_seed(0)
        untrained = build(resolve(BackboneOptions, [about["options"]]), about["channels"], about["image_size"])
        fresh = replace(lens, backbone=untrained.eval().to(device))
        options = data if isinstance(data, DataOptions) else resolve(DataOptions, [recipe.get("data") or {}])
        index = options.open(options.probe if data in (None, options) else str(data))
    except (UserError, DataError) as error:
        missing = str(error)
    return Material(path, recipe, read_metrics(path / "metrics.jsonl"), state, lens, fresh, index, missing)


def read_metrics(path: Path) -> list[Line]:
    """One line a step, in order. Lines of one step are merged, a half-written one is skipped."""
    merged: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
            merged.setdefault(int(line["step"]), {}).update(line)
        except (ValueError, KeyError, TypeError):  # the last line of a killed run
            continue
    return [merged[step] for step in sorted(merged)]


def verdict(lines: Sequence[Line]) -> tuple[str, str]:
    """(tone, one sentence) on the state of a run, judged by the last tenth of its logged values."""
    if not lines:
        return "quiet", "Nothing has been logged yet."
    losses = [v for k, v in lines[-1].items() if k.startswith("loss")]
    if lines[-1].get("skipped") and (not losses or not all(isfinite(v) for v in losses)):
        return "bad", "The gradients are no longer finite and steps are skipped: go back to a lower learning rate."
    if not all(isfinite(v) for v in losses):
        return "bad", "A loss is no longer finite: go back to an older checkpoint with a lower learning rate."
    if found := alarms(lines):
        return ("bad" if found[0].severe else "warn"), str(found[0])
    entropy = late(lines, "health/target_entropy") / max(late(lines, "health/max_entropy"), 1e-9)
    usage, rank = late(lines, "health/prototype_usage"), late(lines, "health/rankme")
    signs = {"target entropy at {:.0%} of its maximum": entropy, "{:.0%} of the reachable prototypes in use": usage}
    signs["RankMe {:.0f}"] = rank
    found = ", ".join(text.format(value) for text, value in signs.items() if isfinite(value))
    return "good", "No sign of collapse" + (f": {found}." if found else "; health was not logged.")


def _head(page: Page, m: Material) -> None:
    data, about = m.state.get("data", {}), m.state.get("backbone", {})
    steps, images = _last(m.lines, "step"), _last(m.lines, "images")
    seconds, planned, samples = _last(m.lines, "seconds"), m.recipe.get("steps"), data.get("samples")
    synthetic = data.get("synthetic", m.index is not None and m.index.synthetic)
    backbone = m.recipe.get("backbone") or {}
    args = [f"{key} {value}" for key, value in (backbone.get("args") or {}).items()]
    facts = {
        "Steps": f"{steps:,}" + (f" of {planned:,}" if planned and planned != steps else "") if steps else None,
        "Images seen": images,
        "Data": f"{samples:,} {'synthetic ' if synthetic else ''}images" if samples else None,
        "Times through the data": f"{images / samples:.1f}" if images and samples else None,
        "Sources": ", ".join(data.get("sources") or ()) or None,
        "Classes": len(data["classes"]) if data.get("classes") else None,
        "Backbone": ", ".join([backbone["name"], *args]) if "name" in backbone else None,
        "Image size": f"{about['image_size']} px" if about else None,
        "Objectives": ", ".join(m.recipe.get("objectives") or ()) or None,
        **_speed(m.lines, unfinished=bool(steps and planned and steps < planned)),
        "Duration": duration(seconds) if seconds is not None else None,
        "Machine": m.state.get("machine"),
        "Skipped steps": sum(line.get("skipped", 0) for line in m.lines) or None,
    }
    page.facts((name, value) for name, value in facts.items() if value is not None)
    tone, sentence = verdict(m.lines)
    page.note(sentence, tone)
    if synthetic:
        page.note("The images are synthetic, drawn by a program: nothing here tells how it does on patients.", "warn")
    if m.missing:
        page.note(f"Pictures of what the backbone sees are left out: {m.missing}", "warn")


def _speed(lines: Sequence[Line], unfinished: bool) -> dict[str, str]:
    """Facts for the head: medians over the run, the last word on memory and on the time left."""
    keys = ("images_per_s", "data_wait", "tflops", "mfu")
    usual = {key: median(y for _, y in found) for key in keys if (found := points(lines, key))}
    memory, left = _last(lines, "memory_gib"), _last(lines, "eta") if unfinished else None
    facts = {
        "Images per second": f"{usual['images_per_s']:.0f}" if "images_per_s" in usual else "",
        "Waiting for data": f"{usual['data_wait']:.0%}" if "data_wait" in usual else "",
        "Work": flops(usual["tflops"]) if "tflops" in usual else "",
        "Of the device's peak": f"{usual['mfu']:.0%}" if "mfu" in usual else "",
        "Memory": f"{memory:.1f} GiB" if memory is not None else "",
        "Still to go": duration(left) if left is not None else "",
    }
    return {name: value for name, value in facts.items() if value}


def _losses(page: Page, m: Material) -> None:
    expects = {name: kind.expects for name, kind in objective_types().items()}
    names = sorted({key.removeprefix("loss/") for line in m.lines for key in line if key.startswith("loss/")})
    table = [(name, {"": f"loss/{name}"}, expects.get(name.split("/")[0], "")) for name in names]
    intro = "Each before its weight. Not every loss has to fall: the line below each says what to expect of it."
    small = [line["step"] for line in m.lines if line.get("global_size", inf) < m.lines[-1].get("global_size", 0)]
    if small:
        intro += f" After step {small[-1]:,} all crops have twice the size: a jump there is no fault."
    _charts(page, m, "Losses", intro, [("Total", {"": "loss"}, "The weighted sum; read its parts."), *table])


def _charts(
    page: Page, m: Material, title: str, intro: str, table: Sequence[tuple[str, Mapping[str, str], str]]
) -> None:
    """A section of small charts; one whose values were not logged is left out, and so is an empty section."""
    charts: list[tuple[Markup, str]] = []
    for name, curves, how in table:
        series = {label: found for label, key in curves.items() if (found := points(m.lines, key))}
        if series:
            top = _last(m.lines, "health/max_entropy") if "entropy" in name else None
            level = {f"ln K = {top:.2f}": top} if top is not None else None
            charts.append(
                (line_chart(series, name, reference=level, y_range=(0, None) if level else (None, None)), how)
            )
    if charts:
        page.section(title, intro).figures(charts)


def _last(lines: Sequence[Line], key: str) -> Any:
    return next((line[key] for line in reversed(lines) if line.get(key) is not None), None)


def duration(seconds: float) -> str:
    """3725 -> "1 h 02 min"."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
