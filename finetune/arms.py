"""The arms of `efficiency`: each turns test images into masks, which are measured as the truth is.

An arm is a head trained on N masks, or a promptable model with one kind of prompt. All arms see the same test images in
one pass; a seed stands for another draw of training masks, or of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from finetune.agreement import statistics
from finetune.masks import Overlap, dice, iou, overlap, read_pair
from finetune.measurements import NAMES, measure, pixel_length
from finetune.patch_samples import Samples, progress
from finetune.promptable import KINDS, Promptable, simulate
from finetune.resample import Statistic
from finetune.segmenters import Head, predict_masks
from shards.format import decode
from shards.index import Index

Array = np.ndarray
SHOWN = 6  # test cases whose masks are kept for the page
BATCH = 8  # images at a time: an embedding of SAM has 4 MB


@dataclass
class Arm:
    """masks: labelled masks that it took (0 for a prompt); prompts: a case."""

    name: str
    masks: int = 0
    prompts: int = 0
    kind: str = ""  # of prompt
    heads: Sequence[Head] = ()  # one a seed
    counts: list[list[Array]] = field(default_factory=list)  # of every seed: overlap [n, 1, 3] a batch
    values: list[list[dict[str, float]]] = field(default_factory=list)  # of every seed: measurements of every case
    shown: dict[int, Array] = field(default_factory=dict)  # test row -> mask of the first seed


@dataclass(frozen=True)
class Truth:
    values: dict[str, Array]  # measurement -> [N]
    images: dict[int, Array]  # test row -> image [3, S, S], of the cases that are shown
    masks: dict[int, Array]


def read(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    index: Index,
    samples: Samples,
    test: Array,
    lengths: Array,
    promptable: Promptable | None,
) -> Truth:
    """Fill counts, values and shown of every arm; test: rows of `samples`; lengths [N]: of a pixel's side."""
    for arm in arms:
        arm.counts, arm.values = [[] for _ in seeds], [[] for _ in seeds]
    keep = set(np.linspace(0, len(test) - 1, min(SHOWN, len(test))).astype(int).tolist())
    truth = Truth({}, {}, {})
    readings: list[dict[str, float]] = []
    with progress("test cases", len(test)) as advance:
        for start in range(0, len(test), BATCH):
            rows = test[start : start + BATCH]
            numbers, masks = samples.numbers[rows], samples.masks[rows]
            images = [read_pair(index, int(n), samples.size)[0] for n in numbers]
            found = _predict(arms, seeds, index, samples, rows, promptable)

            def measured(mask: Array, at: int, images: list[Array] = images, start: int = start) -> dict[str, float]:
                colour = images[at].transpose(1, 2, 0) if len(images[at]) == 3 else None
                return measure(mask > 0, colour, float(lengths[start + at]))

            readings += [measured(mask, at) for at, mask in enumerate(masks)]
            for arm in arms:
                for s, own in enumerate(found[arm.name]):
                    arm.counts[s].append(overlap(masks, own))
                    arm.values[s] += [measured(mask, at) for at, mask in enumerate(own)]
            for at in range(len(rows)):
                if start + at in keep:
                    truth.images[start + at], truth.masks[start + at] = images[at], masks[at]
                    for arm in arms:
                        arm.shown[start + at] = found[arm.name][0][at]
            advance(len(rows))
    truth.values.update(columns(readings))
    return truth


def _predict(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    index: Index,
    samples: Samples,
    rows: Array,
    promptable: Promptable | None,
) -> dict[str, list[Array]]:
    """Arm -> a mask of every image, uint8 [n, S, S], for every seed. A large image is embedded once for all prompts."""
    found = {arm.name: [predict_masks(head, samples, rows) for head in arm.heads] for arm in arms if arm.heads}
    if promptable is not None:
        numbers, masks, size = samples.numbers[rows], samples.masks[rows], samples.size
        memory = promptable.embed(large(index, numbers, promptable.size))
        for arm in (arm for arm in arms if arm.kind):
            draws = [[np.random.default_rng((seed, int(n), KINDS[arm.kind])) for n in numbers] for seed in seeds]
            prompts = [[simulate(arm.kind, m, rng) for m, rng in zip(masks, of, strict=True)] for of in draws]
            found[arm.name] = [promptable.decode(memory, asked, size) for asked in prompts]
    return found


def large(index: Index, numbers: Array, size: int) -> torch.Tensor:
    """The images at the promptable model's own size, in colour: uint8 [N, 3, T, T]."""
    images = torch.from_numpy(np.stack([read_pair(index, int(n), size)[0] for n in numbers]))
    return images.expand(-1, 3, -1, -1)


def pixel_lengths(index: Index, numbers: Array, size: int) -> tuple[Array, int]:
    """(mm of a pixel of the grid [N], how many cases tell it). Unless all do, pixels stay the unit, 1 each."""
    lengths = np.ones(len(numbers))
    given = 0
    for at, number in enumerate(numbers):
        sample = index.read(int(number))
        mm = pixel_length(sample.meta, sample.key)
        if mm is None:
            continue
        given += 1
        lengths[at] = mm * min(decode(sample.image, 0, index.channels).shape[:2]) / size
    return (lengths if given == len(numbers) else np.ones(len(numbers))), given


def columns(readings: Sequence[dict[str, float]]) -> dict[str, Array]:
    """Measurement -> [N]."""
    return {name: np.array([row[name] for row in readings]) for name in NAMES}


def measurable(truth: Truth) -> list[str]:
    """The measurements that at least three true masks allow and in which they differ."""
    finite = {name: values[np.isfinite(values)] for name, values in truth.values.items()}
    return [name for name, values in finite.items() if len(values) >= 3 and np.ptp(values) > 0]


def statistics_of(arm: Arm, truth: Truth) -> dict[str, Statistic]:
    """What an arm is judged by, as functions of image weights; each the mean over its seeds.

    iou, dice: mean over cases. "area icc_2_1" and the like: agreement of a measurement. icc: the mean of ICC(2,1) over
    the measurements, one figure to compare arms by.
    """
    counts = [np.concatenate(own) for own in arm.counts]
    found: dict[str, Statistic] = {
        name: _mean([_overlap(share, own) for own in counts]) for name, share in (("iou", iou), ("dice", dice))
    }
    names = measurable(truth)
    for name in names:
        each = [_pairs(columns(own)[name], truth.values[name]) for own in arm.values]
        found |= {f"{name} {statistic}": _mean([own[statistic] for own in each]) for statistic in each[0]}
    found["icc"] = _mean([found[f"{name} icc_2_1"] for name in names])
    return found


def missing(arm: Arm, truth: Truth, name: str) -> float:
    """Cases in which the truth could be measured and the arm's mask could not; mean over seeds."""
    there = np.isfinite(truth.values[name])
    return float(np.mean([(there & ~np.isfinite(columns(own)[name])).sum() for own in arm.values]))


def _overlap(share: Callable[[Array], Array], counts: Array) -> Statistic:
    return lambda weight: Overlap(share, False)(counts, counts, weight)


def _mean(statistics: Sequence[Statistic]) -> Statistic:
    return lambda weight: np.mean([of(weight) for of in statistics], axis=0)


def _pairs(measured: Array, truth: Array) -> dict[str, Statistic]:
    """agreement.statistics over the cases in which both could be measured."""
    there = np.isfinite(measured) & np.isfinite(truth)
    if there.sum() < 3:
        return dict.fromkeys(statistics(truth, truth), lambda weight: np.full(len(weight), np.nan))

    def only(of: Statistic) -> Statistic:
        return lambda weight: of(weight[:, there])

    return {name: only(of) for name, of in statistics(measured[there], truth[there]).items()}
