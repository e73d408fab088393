"""The figures of `efficiency`: what each arm reached, whether two of them differ, and what a case costs a machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from finetune import compute
from finetune.agreement import bland_altman, icc
from finetune.arms import Arm, Truth, columns, large, measurable, missing
from finetune.encoder import Encoder
from finetune.masks import read_pair
from finetune.patch_samples import Samples
from finetune.promptable import PROMPTS, Promptable, simulate
from finetune.resample import Draws, holm
from finetune.segmenters import HEADS, build_head, segmenter
from shards.index import Index

Array = np.ndarray
ALPHA = 0.05


def describe(arm: Arm, truth: Truth, draws: dict[str, Draws]) -> dict[str, Any]:
    """An arm's figures for results.json, every interval over groups but for those "as_independent"."""
    own = {name.removeprefix(f"{arm.name}: "): d for name, d in draws.items() if name.startswith(f"{arm.name}: ")}
    first, measures = columns(arm.values[0]), {}
    for name in measurable(truth):
        of = {key.removeprefix(f"{name} "): _row(d) for key, d in own.items() if key.startswith(f"{name} ")}
        pair = np.stack([first[name], truth.values[name]], 1)
        pair = pair[np.isfinite(pair).all(1)]
        measures[name] = {**of, "missing": missing(arm, truth, name), "as_independent": _independent(pair)}
    figures = {name: _row(own[name]) for name in ("iou", "dice", "icc")}
    return {"name": arm.name, "masks": arm.masks, "prompts": arm.prompts, **figures, "measures": measures}


def _independent(pair: Array) -> dict[str, Any] | None:
    """The intervals of the papers, for the first seed: they take the cases as independent."""
    if len(pair) < 3:
        return None
    plain = bland_altman(*pair.T)
    found = {"bias": plain.bias, "limit_low": plain.lower, "limit_high": plain.upper}
    found |= {"icc_2_1": icc(pair), "icc_3_1": icc(pair, absolute=False)}
    return {name: [i.value, i.low, i.high] for name, i in found.items()} | {"n": plain.n}


def pairs(arms: list[Arm]) -> list[tuple[Arm, Arm, str]]:
    """What is compared: every head with every kind of prompt, in Dice and in mean ICC."""
    return [(a, b, m) for m in ("dice", "icc") for b in arms if b.kind for a in arms if a.masks]


def compare(arms: list[Arm], draws: dict[str, Draws]) -> list[dict[str, Any]]:
    """The first of each of `pairs` less the second: on the same resampled groups, corrected for their number (Holm)."""
    found = [draws[f"{a.name}: {m}"] - draws[f"{b.name}: {m}"] for a, b, m in pairs(arms)]
    rows = []
    for (a, b, metric), difference, p in zip(pairs(arms), found, holm([d.p for d in found]), strict=True):
        side = "better" if difference.value > 0 else "worse"
        verdict = side if p <= ALPHA else "not shown to differ"
        rows.append(
            {"masks": a.masks, "prompt": b.name, "metric": metric, **_row(difference), "p": p, "verdict": verdict}
        )
    return rows


def costs(
    encoder: Encoder,
    promptable: Promptable | None,
    arms: list[Arm],
    index: Index,
    samples: Samples,
    test: Array,
    head: str,
) -> dict[str, dict[str, float]]:
    """Way of segmenting -> parameters, GFLOPs and seconds of one case (one image at a time), measured in turns."""
    number, mask = int(samples.numbers[test[0]]), samples.masks[test[0]]
    image = torch.from_numpy(read_pair(index, number, samples.size)[0])[None]
    segment = segmenter(arms[0].heads[0], encoder)
    calls = {"self-supervised": lambda: segment(image)}
    widths = [level.shape[1] for level in samples.maps[HEADS[head]]]
    built = None if head == "knn" else build_head(head, widths, 1)
    sizes = {"self-supervised": compute.parameters(encoder.model, built)}
    if promptable is not None:
        big = large(index, np.array([number]), promptable.size)
        for kind, name in PROMPTS.items():
            prompt = simulate(kind, mask, np.random.default_rng(0))
            calls[name] = lambda p=prompt: promptable.decode(promptable.embed(big), [p], samples.size)
            sizes[name] = compute.parameters(promptable.model)
    spent = compute.seconds(calls, encoder.device)
    base = spent["self-supervised"]
    return {
        name: {
            "parameters": sizes[name],
            "gflops": compute.gflops(call),
            "seconds": spent[name],
            "ratio": spent[name] / base,
        }
        for name, call in calls.items()
    }


def _row(draws: Draws) -> dict[str, float]:
    found = draws.interval
    return {"value": found.value, "low": found.low, "high": found.high}
