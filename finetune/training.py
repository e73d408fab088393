"""The one training loop of the adapted protocols: light views of labelled images, one step after another, and val.

Order and views are functions of the seed; everything else that is random comes from torch's global generator, which
the caller seeds. Val chooses the epoch; the test images are not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional

from finetune.adapters import Classifier
from finetune.kinds import Kind
from finetune.probe import link
from finetune.task import Task
from hybridssl import views
from hybridssl.schedule import warmup_cosine
from shards.format import decode
from shards.index import Index

Array = np.ndarray
CLIP = 1.0  # largest gradient norm
FLIPS = {
    "none": (),
    "across": (-1,),
    "down": (-2,),
    "both": (-1, -2),
}  # name -> axes of an image along which it may turn


@dataclass(frozen=True)
class Recipe:
    batch: int
    epochs: int  # at most
    patience: int  # epochs without a better val before it stops
    weight_decay: float
    layer_decay: float  # learning rate x this per block, from the last down (BEiT, 2106.08254)
    warmup: float  # share of the steps with a rising learning rate; then a cosine to nothing
    steps: int = 20  # an epoch has at least so many: ten labels are one batch, and val need not be asked after each
    mixup: float = 0.2  # alpha of the Beta distribution (Zhang et al., 1710.09412, eq. 2); 0: no mixing
    crop: float = 0.5  # smallest share of the image that a random crop shows; 1: no crops
    flips: str = "both"  # a key of FLIPS


@dataclass(frozen=True)
class Trained:
    """The best moment of one training."""

    state: dict[str, Tensor]  # the parameters that moved, on the CPU
    val: float
    epoch: int  # 0: before the first step
    history: list[dict[str, Any]]  # an entry an epoch: epoch, loss, val


def train(
    classifier: Classifier,
    work: Task,
    rows: tuple[Array, Array],
    recipe: Recipe,
    lr: float,
    seed: int,
    tick: Callable[[int, float], None] = lambda epoch, val: None,
) -> Trained:
    """Train on the rows `rows[0]` until those of `rows[1]` get no better. tick is called after every epoch."""
    (train_rows, val_rows), device = rows, work.encoder.device
    target = torch.from_numpy(one_hot(work.y[train_rows], len(work.classes)))  # [N, K]
    prior = log_prior(target, work.kind).to(device)
    per_epoch = max(math.ceil(len(train_rows) / recipe.batch), recipe.steps)
    total, batches = per_epoch * recipe.epochs, draw(work, train_rows, recipe, per_epoch * recipe.epochs, seed)
    optimizer = torch.optim.AdamW(groups(classifier, recipe))

    def judge() -> float:
        value = work.kind.point(work.y[val_rows], predict(classifier, work, val_rows))
        return value if math.isfinite(value) else -math.inf

    best = Trained(_state(classifier), judge(), 0, [])
    history: list[dict[str, Any]] = best.history
    for epoch in range(1, recipe.epochs + 1):
        classifier.train()
        losses = []
        for step in range((epoch - 1) * per_epoch, epoch * per_epoch):
            images, at = next(batches)
            images, wanted = mix(images.to(device).float(), target[at].to(device), recipe.mixup)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"] * warmup_cosine(1, 0, recipe.warmup, (step + 1) / (total + 1))
            with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
                logits = classifier(images)
            loss = loss_of(logits.float(), wanted, work.kind, prior)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(classifier.moving().values(), CLIP)
            optimizer.step()
            losses.append(loss.item())
        val = judge()
        history.append({"epoch": epoch, "loss": float(np.mean(losses)), "val": val})
        tick(epoch, max(val, best.val))
        if val > best.val:
            best = Trained(_state(classifier), val, epoch, history)
        if epoch - best.epoch >= recipe.patience or not math.isfinite(losses[-1]):
            break
    return best


def groups(classifier: Classifier, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameter groups with `lr_scale`: the backbone's by layer, then the head's. Norms and biases do not decay."""
    model, head = classifier.model, classifier.head
    spared = getattr(model, "no_weight_decay", set)()
    found = param_groups_layer_decay(model, recipe.weight_decay, spared, layer_decay=recipe.layer_decay)
    kept = [{"params": g["params"], "lr_scale": g["lr_scale"], "weight_decay": g["weight_decay"]} for g in found]
    for decays in (True, False):
        own = [p for p in head.parameters() if (p.ndim > 1) is decays]
        kept.append({"params": own, "lr_scale": 1.0, "weight_decay": recipe.weight_decay if decays else 0.0})
    return [group for group in kept if group["params"]]


def one_hot(y: Array, classes: int) -> Array:
    """int [N] or multi-hot [N, K] -> float32 [N, K]."""
    return (y if y.ndim == 2 else np.eye(classes)[y]).astype(np.float32)


def log_prior(target: Tensor, kind: Kind) -> Tensor:
    """[N, K] -> [K]: log shares of the classes that exclude each other; 0 for the others, and for those not there."""
    share = target.mean(0)
    return torch.zeros_like(share) if kind.multi_label else torch.where(share > 0, share, 1.0).log()


def loss_of(logits: Tensor, target: Tensor, kind: Kind, prior: Tensor) -> Tensor:
    """Logits and soft targets [N, K] -> mean loss. Classes that exclude each other count alike however rare: their log
    prior is added in training and left out in scoring, which is consistent for balanced accuracy (Menon et al.,
    2007.07314, eq. 10) and, unlike weights, lets no single image of a rare class pull the network fifty times as hard.
    """
    if kind.multi_label:
        return functional.binary_cross_entropy_with_logits(logits, target)
    return functional.cross_entropy(logits + prior, target)


def mix(images: Tensor, target: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Every image mixed with another of the batch, and their targets with the same weight (1710.09412, eq. 2)."""
    if alpha <= 0:
        return images, target
    weight = float(torch.distributions.Beta(alpha, alpha).sample())
    other = torch.randperm(len(images)).to(images.device)
    return weight * images + (1 - weight) * images[other], weight * target + (1 - weight) * target[other]


def _state(classifier: Classifier) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in classifier.moving().items()}


# ------------------------------------------------------------------------------------------------------------- images


class Images(torch.utils.data.Dataset):
    """(position, row) -> (uint8 [C, S, S], row). With a recipe a random view, a function of (seed, position, number);
    without, what every evaluation sees."""

    def __init__(self, index: Index, numbers: Array, size: int, recipe: Recipe | None = None, seed: int = 0) -> None:
        self.index, self.numbers, self.size, self.recipe, self.seed = index, numbers, size, recipe, seed

    def __getitem__(self, at: tuple[int, int]) -> tuple[Tensor, int]:
        position, row = at
        number, channels, recipe = int(self.numbers[row]), self.index.channels, self.recipe
        data = self.index.read(number).image
        if recipe is None:
            return torch.from_numpy(views.resize_for_eval(decode(data, self.size, channels), self.size)), row
        image = decode(data, math.ceil(self.size / math.sqrt(recipe.crop)), channels)
        rng, axes = views.generator(self.seed, position, number), FLIPS[recipe.flips]
        if recipe.crop < 1:
            height, width = image.shape[:2]
            top, left, h, w = views.draw_box(rng, height, width, (recipe.crop, 1.0), (3 / 4, 4 / 3))
            shown = views.resize(image[top : top + h, left : left + w], self.size)
            made = views.planes([shown], self.size, channels)[0]
        else:
            made = views.resize_for_eval(image, self.size)
        turned = [axis for axis in axes if rng.random() < 0.5]
        return torch.flip(torch.from_numpy(made), turned), row


def _loader(
    data: Images, order: Sequence[tuple[int, int]], batch: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    return iter(torch.utils.data.DataLoader(data, batch, sampler=order, num_workers=workers))  # type: ignore[arg-type]


def draw(work: Task, rows: Array, recipe: Recipe, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches (uint8 [B, C, S, S], positions in `rows` [B]) from one permutation of the rows after another."""
    rng, count = np.random.default_rng(seed), steps * recipe.batch
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-count // len(rows)))])[:count]
    images = Images(work.index, work.features.numbers[rows], work.encoder.input_size, recipe, seed)
    return _loader(images, list(enumerate(order.tolist())), recipe.batch, work.args.workers)


@torch.no_grad()
def predict(classifier: Classifier, work: Task, rows: Array, flips: Sequence[tuple[int, ...]] = ((),)) -> Array:
    """Probabilities float64 [M, K] of the rows, in float32 arithmetic; the mean over the images flipped along each of
    `flips`."""
    classifier.eval()
    images = Images(work.index, work.features.numbers, work.encoder.input_size)
    found = []
    for batch, _ in _loader(images, [(0, int(row)) for row in rows], work.args.batch, work.args.workers):
        batch = batch.to(work.encoder.device)
        logits = [classifier(torch.flip(batch, axes)).double().cpu().numpy() for axes in flips]
        found.append(np.mean([link(values, work.kind.multi_label) for values in logits], axis=0))
    return np.concatenate(found)


def all_flips(name: str) -> list[tuple[int, ...]]:
    """The image as it is, and flipped in every way that `name` of FLIPS allows: what test-time augmentation shows."""
    found: list[tuple[int, ...]] = [()]
    for axis in FLIPS[name]:
        found += [(*axes, axis) for axes in found]
    return found
