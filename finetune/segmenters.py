"""Segmentation heads on frozen patch features: train one, then images in, masks out.

    samples = patch_samples.collect(encoder, index, numbers)         # features and masks, computed once
    head = train_head("linear", samples, train_rows, val_rows)       # chosen on val
    masks = predict_masks(head, samples, test_rows)                  # uint8 [N, S, S]
    segment = segmenter(head, encoder)                               # or for any images: uint8 [N, C, S, S] -> masks

linear: batch norm, dropout 0.1 and a 1x1 convolution on the last patch tokens (DINOv2, section 7.4; DermINO).
upernet: pyramid pooling and a feature pyramid (Xiao 2018, 1807.10221) over four blocks, whose maps are first resized to
4, 2, 1 and 1/2 of the token grid, as is usual for plain transformers (BEiT, 2106.08254). transformers' own head.
knn: every patch asks its nearest training patches, by cosine, how much of each class they hold; nothing is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.encoder import Encoder
from finetune.masks import mean_iou, overlap
from finetune.patch_samples import Samples, half, maps_of, progress
from hybridssl.probe import unit

Array = np.ndarray
HEADS = {"linear": "patches", "knn": "patches", "upernet": "blocks"}  # head -> the maps it reads
LRS, EPOCHS, BATCH = (3e-4, 1e-3, 3e-3), 20, 16
MIN_STEPS, CHECKS = 200, 20  # few images take more epochs; val looks on this often
KS, TEMPERATURE, BANK = (5, 20, 50), 0.07, 50_000
BACKGROUNDS = (1.0, 0.5, 0.25)  # weights of the background's votes: small things never fill half of a patch
WIDTH = 64  # channels inside the UPerNet head (512 in its paper): hundreds of masks teach it, on a CPU too


@dataclass(frozen=True)
class Head:
    """scores: maps of N images (float32, one a level) -> [N, 1 + K, h, w], the background first; the largest wins."""

    name: str
    scores: Callable[[list[Tensor]], Tensor]
    choice: dict[str, Any]  # what val chose
    val: float  # mean IoU on val
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, mean IoU on val) of the chosen run

    @property
    def reads(self) -> str:
        return HEADS[self.name]


def train_head(
    name: str,
    samples: Samples,
    train: Array,
    val: Array,
    seed: int = 0,
    lrs: Sequence[float] = LRS,
    epochs: int = EPOCHS,
) -> Head:
    """The head that does best on val: linear and upernet of `lrs` and steps, knn of KS and BACKGROUNDS."""
    if name == "knn":
        return _nearest(samples, train, val, seed)
    steps = max(MIN_STEPS, epochs * -(-len(train) // BATCH))
    best: Head | None = None
    with progress(f"{name} head, seed {seed}", steps * len(lrs)) as advance:
        for lr in lrs:
            head = _fit(name, samples, train, val, seed, lr, steps, advance)
            if best is None or head.val > best.val:
                best = head
    assert best is not None
    return best


def predict_masks(head: Head, samples: Samples, rows: Array, batch: int = BATCH) -> Array:
    """Masks of the samples `rows` from their stored features: uint8 [n, S, S]."""
    found = [np.zeros((0, samples.size, samples.size), np.uint8)]
    for start in range(0, len(rows), batch):
        maps = samples.levels(head.reads, rows[start : start + batch])
        found.append(_masks(head.scores(maps), samples.size))
    return np.concatenate(found)


def segmenter(head: Head, encoder: Encoder) -> Callable[[Tensor], Array]:
    """The head with its backbone as one function: uint8 [N, C, S, S] -> masks uint8 [N, S, S], any N and S it takes."""
    source = maps_of(encoder, head.reads)

    def segment(images: Tensor) -> Array:
        maps = [torch.from_numpy(half(x)).float().to(encoder.device) for x in source(images)]
        return _masks(head.scores(maps), images.shape[-1])

    return segment


def build_head(name: str, widths: Sequence[int], classes: int) -> nn.Module:
    """A trainable head with fresh weights: maps of `widths` channels -> [N, 1 + classes, h, w]."""
    return Linear(widths[0], 1 + classes) if name == "linear" else UperNet(widths, 1 + classes)


class Linear(nn.Sequential):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(nn.BatchNorm2d(width), nn.Dropout(0.1), nn.Conv2d(width, outputs, 1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        return super().forward(maps[0])


class UperNet(nn.Module):
    def __init__(self, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        from transformers import UperNetConfig
        from transformers.models.upernet.modeling_upernet import UperNetHead

        config = UperNetConfig(hidden_size=WIDTH)
        config.num_labels = outputs
        self.head = UperNetHead(config, list(widths))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps of one grid become a pyramid; those of a network with stages are one already."""
        if len({x.shape[-1] for x in maps}) == 1:
            side = maps[0].shape[-1]
            sides = [max(1, round(side * 2.0 ** (2 - level))) for level in range(len(maps))]
            maps = [F.interpolate(x, size=(s, s), mode="bilinear") for x, s in zip(maps, sides, strict=True)]
        return self.head(maps)


def _fit(
    name: str,
    samples: Samples,
    train: Array,
    val: Array,
    seed: int,
    lr: float,
    steps: int,
    advance: Callable[[int], None],
) -> Head:
    """Adam at one learning rate on the cross-entropy of pixels; the weights of the best of CHECKS looks at val."""
    reads, draw = HEADS[name], np.random.default_rng(seed)
    devices = [samples.device] if samples.device.startswith("cuda") else []
    with torch.random.fork_rng(devices):  # initial weights and dropout come from `seed` alone
        torch.manual_seed(seed)
        model = build_head(name, [x.shape[1] for x in samples.maps[reads]], len(samples.classes)).to(samples.device)
        optimizer = torch.optim.Adam(model.parameters(), lr)
        best, kept, curve = (-1.0, 0), copy.deepcopy(model), []
        truth, checks = samples.masks[val], set(np.linspace(0, steps, CHECKS + 1).round()[1:].astype(int).tolist())
        queue = np.zeros(0, dtype=np.int64)
        for step in range(1, steps + 1):
            if len(queue) < BATCH:
                queue = np.concatenate([queue, draw.permutation(train)])
            rows, queue = np.resize(queue[:BATCH], max(2, len(queue[:BATCH]))), queue[BATCH:]
            logits = model(samples.levels(reads, rows))
            target = torch.from_numpy(samples.masks[rows]).long().to(samples.device)
            logits = F.interpolate(logits, size=target.shape[-2:], mode="bilinear")
            loss = F.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            advance(1)
            if step in checks:
                found = predict_masks(_trained(name, model, {}, 0), samples, val)
                value = np.nan_to_num(mean_iou(overlap(truth, found, len(samples.classes))))
                curve.append((step, float(value)))
                if value > best[0]:
                    best, kept = (float(value), step), copy.deepcopy(model)
    choice = {"lr": lr, "steps": best[1], "epochs": round(best[1] * BATCH / len(train), 1)}
    return _trained(name, kept.eval(), choice, best[0], curve)


def _trained(name: str, model: nn.Module, choice: dict, val: float, curve: Sequence[tuple[int, float]] = ()) -> Head:
    @torch.no_grad()
    def scores(maps: list[Tensor]) -> Tensor:
        training = model.training
        found = model.eval()(maps)
        model.train(training)
        return found

    return Head(name, scores, choice, val, list(curve))


def _nearest(samples: Samples, train: Array, val: Array, seed: int) -> Head:
    """BANK training patches, drawn from all of them; votes weigh exp(cosine / 0.07), as in the image protocol."""
    level, classes = samples.maps["patches"][0], len(samples.classes)
    side = level.shape[-1]
    drawn = np.random.default_rng(seed).permutation(len(train) * side * side)[:BANK]
    drawn.sort()
    vectors, shares = [], []
    for position, row in enumerate(train):  # image by image, so that only what was drawn is in memory
        low, high = np.searchsorted(drawn, [position * side * side, (position + 1) * side * side])
        cells = drawn[low:high] - position * side * side
        vectors.append(level[row].reshape(len(level[row]), -1)[:, cells].T)
        shares.append(patch_shares(samples.masks[row][None], classes, side)[0].reshape(1 + classes, -1)[:, cells].T)
    bank, share = faiss.IndexFlatIP(level.shape[1]), np.concatenate(shares)
    bank.add(unit(np.concatenate(vectors).astype(np.float32)))  # type: ignore[call-arg]

    def votes(maps: list[Tensor], ks: Sequence[int]) -> list[Tensor]:
        x = maps[0]
        cosine, index = bank.search(unit(x.permute(0, 2, 3, 1).flatten(0, 2)), max(ks))  # type: ignore[call-arg]
        weight = np.exp((cosine - cosine[:, :1]) / TEMPERATURE)
        held = weight[..., None] * share[index]  # [P, k, 1 + K]
        found = [held[:, :k].sum(1) / weight[:, :k].sum(1, keepdims=True) for k in ks]
        grid = len(x), *x.shape[-2:], 1 + classes
        return [torch.from_numpy(v).float().reshape(grid).permute(0, 3, 1, 2) for v in found]

    def weighed(scores: Tensor, background: float) -> Tensor:
        return torch.cat([background * scores[:, :1], scores[:, 1:]], 1)

    ks = sorted({min(k, len(share)) for k in KS})
    counts = {(k, background): [] for k in ks for background in BACKGROUNDS}
    with progress(f"k nearest patches, seed {seed}", len(val)) as advance:
        for start in range(0, len(val), BATCH):
            rows = val[start : start + BATCH]
            for k, scores in zip(ks, votes(samples.levels("patches", rows), ks), strict=True):
                for background in BACKGROUNDS:
                    found = _masks(weighed(scores, background), samples.size)
                    counts[k, background].append(overlap(samples.masks[rows], found, classes))
            advance(len(rows))
    values = {key: float(np.nan_to_num(mean_iou(np.concatenate(found)))) for key, found in counts.items()}
    k, background = max(values, key=lambda key: values[key])  # the first of equals: the smallest k
    choice = {"k": k, "background": background, "bank": len(share)}
    return Head("knn", lambda maps: weighed(votes(maps, [k])[0], background), choice, values[k, background])


def patch_shares(masks: Array, classes: int, side: int) -> Array:
    """uint8 [N, S, S] -> float32 [N, 1 + K, side, side]: how much of every patch each class covers; sums to 1."""
    planes = F.one_hot(torch.from_numpy(masks).long(), 1 + classes).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(planes, side).numpy()


def _masks(scores: Tensor, size: int) -> Array:
    """[N, 1 + K, h, w] -> uint8 [N, size, size]: scores interpolated, then the largest."""
    return F.interpolate(scores, size=(size, size), mode="bilinear").argmax(1).to(torch.uint8).cpu().numpy()
