"""From shards to batches: the glue between the stream, which knows no crops, and the views, which know no files."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from hybridssl import views
from hybridssl.backbone import Backbone
from hybridssl.types import Batch, Column, sent
from hybridssl.views import Item, ViewOptions
from pretrain.batches import Watched
from pretrain.columns import columns, encode
from pretrain.curriculum import Curriculum, curriculum
from pretrain.recipe import Recipe
from pretrain.stop import SIGNALS
from shards.errors import DataError
from shards.format import Sample, decode
from shards.index import Index
from shards.stream import Order, Positions


@dataclass(frozen=True)
class ToItem:
    """Turns a decoded sample into crops, masks and colour parameters, all drawn from (seed, epoch, sample)."""

    curriculum: Curriculum
    patch: int
    seed: int
    classes: tuple[str, ...]
    sources: tuple[str, ...]
    clean: bool
    columns: tuple[Column, ...] = ()

    def __call__(self, sample: Sample, image: np.ndarray, position: int, epoch: int, number: int) -> Item:
        rng = views.generator(self.seed, epoch, number)
        # Only labelled images need the mild view: it is what labels supervise, and costs a pass.
        options, clean = self.curriculum.views(position), self.clean and bool(sample.labels)
        crops = views.crop(image, rng, options, self.patch, position, clean)
        labels = np.zeros(len(self.classes), np.uint8)
        labels[[self.classes.index(name) for name in sample.labels]] = 1
        source = self.sources.index(sample.source) if sample.source in self.sources else -1
        meta = encode(self.columns, sample.meta, sample.source)
        return Item(crops, labels, source, bool(sample.labels), sample.text or "", sample.key, meta=meta)


def collate(samples: list[tuple[Item, list[dict]]]) -> Batch:
    """(item, what did not decode on the way to it) pairs to a Batch."""
    batch = views.collate([item for item, _ in samples])
    batch.bad.extend(record for _, bad in samples for record in bad)
    return batch


def micro_batch(recipe: Recipe, world: int) -> int:
    """Images a forward pass of one process. Raises ValueError when the batch cannot be parted evenly."""
    size, asked, whole = recipe.batch.size, recipe.batch.micro, together(recipe)
    assert asked != "auto"  # pretrain/fit.py has put a number there
    micro = asked or size // world
    if micro > 0 and size % (micro * world) == 0:
        return micro
    if fits := fitting(recipe, world):
        advice = f"say batch.micro={fits}"
    else:  # first what a run that is there can do: its batch.size stays
        advice = f"make batch.size a multiple of {whole * world}"
        if fewer := max((n for n in range(1, world) if size % (n * whole) == 0), default=0):
            then = f" with batch.micro={fitting(recipe, fewer)}" if asked else ""
            advice = f"start {fewer} process{'es' * (fewer > 1)}{then}, or {advice}"
    passes = f"into passes of batch.micro={asked} images on" if asked else "evenly over"
    raise ValueError(f"batch.size={size} cannot be parted {passes} {world} process{'es' * (world > 1)}: {advice}")


def fitting(recipe: Recipe, world: int) -> int:
    """The largest batch.micro up to the recipe's, or else the smallest, that parts its batch evenly over `world`
    processes and leaves whole what belongs `together`; 0: none does."""
    share, rest = divmod(recipe.batch.size, world)
    whole, most = together(recipe), recipe.batch.micro or share
    assert most != "auto"
    parts = [n for n in range(whole, share + 1, whole) if share % n == 0 and not rest]
    return max((n for n in parts if n <= most), default=min(parts, default=0))


def together(recipe: Recipe) -> int:
    """Images that a micro-batch must not part: a micro-batch is a multiple of it."""
    spread = recipe.objectives.get("spread")
    return min(spread.group, recipe.batch.size) if spread else 1  # type: ignore[attr-defined]


def selected(recipe: Recipe, index: Index) -> np.ndarray:
    """int64 numbers of the samples that the run reads: those of its splits without what `stream.exclude` names."""
    chosen = index.select(recipe.data.splits)
    if not recipe.stream.exclude:
        return chosen
    from shards.audit import excluded  # faiss, which no other run waits for

    left = chosen
    for audit in recipe.stream.exclude.split(","):
        left = np.setdiff1d(left, excluded(audit.strip(), index))
    if not len(left):
        raise DataError(f"stream.exclude={recipe.stream.exclude} leaves no sample of {index} to train on")
    return left


def loader(recipe: Recipe, index: Index, clean: bool, patch: int, start: int, rank: int, world: int) -> DataLoader:
    """Endless micro-batches of this rank, from global position `start` on."""
    order = Order(index, selected(recipe, index), recipe.stream, recipe.seed)
    wanted = columns(recipe, index)
    sizes = curriculum(recipe, patch)
    to_item = ToItem(sizes, patch, recipe.seed, index.classes, index.sources, clean, wanted)
    workers = recipe.data.workers
    dataset = Watched(index, order, to_item, sizes.decode_at_least)
    dataset.at = torch.full((workers, 2), -1).share_memory_()
    return DataLoader(
        dataset,
        batch_sampler=Positions(recipe.batch.size, start, rank, world, micro_batch(recipe, world)),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals_to_the_main_process,
    )


def label_counts(recipe: Recipe, index: Index) -> np.ndarray:
    """float [S, K]: labelled images of each source and class among as many draws as the selection has samples.

    By the first label, as the stream balances; `stream.labelled_fraction` of the draws go round the classes.
    """
    chosen = selected(recipe, index)
    source, label = (np.asarray(index.column(name)[chosen]) for name in ("source", "label"))
    member = np.searchsorted(index.bounds, chosen, side="right") - 1
    sizes = np.bincount(member, minlength=len(index.members))
    rates = np.array(recipe.stream.shares(sizes.tolist()), float) * len(chosen) / np.maximum(sizes, 1)
    there, known = np.zeros((2, len(index.sources), len(index.classes))), label >= 0
    np.add.at(there[0], (source[known], label[known]), 1)
    np.add.at(there[1], (source[known], label[known]), rates[member[known]])  # as often as a mix shows its set
    share, present = recipe.stream.labelled_fraction, there[0].sum(axis=0)
    balanced = there[0] / np.maximum(present, 1) / max(np.count_nonzero(present), 1)
    return (1 - share) * there[1] + share * len(chosen) * balanced


def _leave_signals_to_the_main_process(worker: int) -> None:
    # They reach the whole process group; a worker that died of one would fail the step that is to be finished.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def eval_images(index: Index, numbers: np.ndarray, size: int, batch: int, threads: int) -> Iterator[torch.Tensor]:
    """uint8 [B, C, size, size] in evaluation geometry; black where unreadable: a probe must not end a run.

    Read here and decoded by `threads`, for decoders let go of Python's lock. A batch is one ahead of whoever takes it.
    """

    def read(number: int) -> bytes:
        try:
            return index.read(number).image
        except DataError:
            return b""

    def shown(data: bytes) -> np.ndarray:
        try:
            return views.resize_for_eval(decode(data, size, index.channels), size)
        except DataError:
            return np.zeros((index.channels, size, size), np.uint8)

    with ThreadPoolExecutor(threads) as pool:
        ahead: list[Future[np.ndarray]] = []
        for start in range(0, len(numbers) + batch, batch):
            mine, ahead = ahead, [pool.submit(shown, read(int(n))) for n in numbers[start : start + batch]]
            if mine:
                yield torch.from_numpy(np.stack([one.result() for one in mine]))


@torch.no_grad()
def features(
    backbone: Backbone,
    index: Index,
    numbers: np.ndarray,
    options: ViewOptions,
    batch: int = 64,
    threads: int = 1,
) -> np.ndarray:
    """CLS features [N, D] of the samples `numbers`, on the backbone's device, in evaluation geometry.

    threads: that decode. One alone lets a GPU wait for several seconds per thousand images.
    """
    device = next(backbone.parameters()).device

    def chunks() -> Iterator[torch.Tensor]:
        for images in eval_images(index, numbers, options.global_size, batch, threads):
            pixels = views.normalise(sent(images, device), options.mean, options.std)
            yield backbone(pixels).cls.float()

    return torch.cat(list(chunks())).cpu().numpy() if len(numbers) else np.zeros((0, backbone.dim), np.float32)
