"""Toy tokens and batches for the objectives: what a backbone and a loader would hand over, drawn from a seed."""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from hybridssl.objectives import Context, build
from hybridssl.types import Batch, Column, Tokens, Views, ViewTokens, sent

DIM, PATCHES, CLASSES = 12, 9, 5
NAMED = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()  # source 2 can name nothing
COLUMNS = (Column("age", mean=50.0, std=15.0), Column("sex", ("f", "m")), Column("site", ("a", "b", "c")))
WORDS = "no left right lung clear opacity effusion"
REPORTS = ("left lung clear", "", "right effusion", "no opacity", "left  lung clear\n", "opacity left", "right lung")
SMALL = {"prototypes": 7, "hidden": 16, "bottleneck": 6, "freeze_last": 0.0}


@pytest.fixture
def toys() -> ModuleType:
    return sys.modules[__name__]


def context(**changes) -> Context:
    changes = {"columns": COLUMNS, **changes}
    return replace(Context(dim=DIM, classes=CLASSES, named=NAMED, steps=100, patch=2, patches=PATCHES), **changes)


@functools.cache
def tiny_encoder() -> str:
    """A random BERT of one layer, 16 wide, in a folder that goes when the tests end."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    (folder / "vocab.txt").write_text("\n".join(f"[PAD] [UNK] [CLS] [SEP] [MASK] {WORDS}".split()))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(BertConfig(vocab_size=5 + len(WORDS.split()), max_position_embeddings=12, **size))
    model.save_pretrained(folder)
    return str(folder)


class ToyTower:
    """Stands for TextTower where the import of transformers would take longer than the test: a vector a length."""

    width = 16

    def __init__(self, encoder: str, pooling: str, how: str, most: int) -> None:
        self.table = torch.randn(32, self.width, generator=torch.Generator().manual_seed(5))
        self.start = {} if how == "frozen" else {"table": self.table}

    def __call__(self, sentences: list[str], moving: dict[str, Tensor], device: torch.device) -> Tensor:
        lengths = sent(torch.tensor([len(s) for s in sentences]), device)
        return moving.get("table", sent(self.table, device))[lengths]


def batch(images: int, seed: int = 0, masked: float = 0.5, labelled: float = 0.7) -> Batch:
    """Half of the views with random masks, most images with one label that their source can name."""
    g = torch.Generator().manual_seed(seed)
    masks = torch.rand(2, images, PATCHES, generator=g) < 0.4
    masks[..., 0] = True  # a view that is masked has at least one masked patch
    masks &= torch.rand(2, images, 1, generator=g) < masked
    source = torch.randint(-1, 2, (images,), generator=g)
    could = torch.cat([NAMED, torch.ones(1, CLASSES, dtype=torch.bool)])[source]
    labels = torch.zeros(images, CLASSES, dtype=torch.uint8)
    labels[torch.arange(images), torch.multinomial(could.float(), 1, generator=g)[:, 0]] = 1
    known = torch.rand(images, generator=g) < labelled
    nothing = torch.zeros(2, images, 0, dtype=torch.uint8)
    text = [REPORTS[(seed + i) % len(REPORTS)] for i in range(images)]  # some twice, some none
    meta = torch.stack(
        [torch.randn(images, generator=g), *(torch.randint(c, (images,), generator=g) for c in (2, 3))], 1
    )
    meta[torch.rand(meta.shape, generator=g) < 0.3] = torch.nan
    labels *= known[:, None]
    return Batch(nothing, nothing, nothing[0], nothing, masks, labels, source, known, meta=meta, text=text)


def tokens(images: int, seed: int = 0, local: int = 3) -> ViewTokens:
    g = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> Tokens:
        shapes = ((rows, DIM), (rows, 0, DIM), (rows, PATCHES, DIM))
        return Tokens(*(torch.randn(s, generator=g).requires_grad_() for s in shapes))

    made = ViewTokens(draw(2 * images), draw(local * images) if local else None, draw(images))
    return replace(made, views=Views(torch.randn(2 * images, 3, 6, 6, generator=g)))  # 3 x 3 patches of 2 x 2 pixels


def split_tokens(views: ViewTokens, images: int, parts: int) -> list[ViewTokens]:
    """Micro-batches of consecutive images; rows stay view-major."""

    def chunks(t: Tensor) -> list[Tensor]:
        return [c.flatten(0, 1) for c in t.unflatten(0, (-1, images)).chunk(parts, dim=1)]

    def each(t: Tensor | Tokens | Views | ViewTokens | None) -> list:
        if t is None:
            return [None] * parts
        if isinstance(t, Tensor):
            return chunks(t)
        return [type(t)(*p) for p in zip(*(each(getattr(t, f.name)) for f in fields(t)), strict=True)]

    return each(views)


def split_batch(whole: Batch, parts: int) -> list[Batch]:
    one = replace(whole, masks=whole.masks.transpose(0, 1))  # images first, as in the other fields
    names = ("masks", "labels", "source", "labelled", "meta")
    pieces = zip(*(getattr(one, n).chunk(parts) for n in names), strict=True)
    made = [replace(whole, **dict(zip(names, p, strict=True))) for p in pieces]
    starts = [sum(len(b.source) for b in made[:i]) for i in range(len(made))]
    made = [replace(b, text=whole.text[at : at + len(b.source)]) for b, at in zip(made, starts, strict=True)]
    return [replace(b, masks=b.masks.transpose(0, 1), global_=whole.global_[:, : len(b.source)]) for b in made]


def pair(options: dict, seed: int = 0, **changes) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Student and teacher copies with different weights."""
    if "text_pairs" in options and "encoder" not in changes:
        changes["encoder"] = tiny_encoder()
    torch.manual_seed(seed)
    student, teacher = build(options, context(**changes)), build(options, context(**changes))
    for module in (student, teacher):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return student, teacher.requires_grad_(False)


def step(student, teacher, views, taught, batches, progress: float = 0.5) -> dict[str, Tensor]:
    """What the loop does with the micro-batches of a step: losses averaged over them, gradients accumulated."""
    targets = {name: o.targets(taught, batches, progress) for name, o in teacher.items()}
    total: dict[str, Tensor] = {}
    for i, (view, one) in enumerate(zip(views, batches, strict=True)):
        losses = {k: v for n, o in student.items() for k, v in o(view, targets[n][i], one, progress).items()}
        (torch.stack(list(losses.values())).sum() / len(batches)).backward()
        total = {k: total.get(k, 0) + v.detach() / len(batches) for k, v in losses.items()}
    return total


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: copy.deepcopy(p.grad) for n, p in module.named_parameters() if p.grad is not None}
