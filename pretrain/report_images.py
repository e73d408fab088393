"""The sections of the report that show images and features: map, neighbours, inside the image, class prototypes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from hybridssl.charts import heat_map, legend, palette, scatter
from hybridssl.page import GREY, Markup, Page, inline
from hybridssl.pictures import cls_attention, enlarge, glow, jpeg, patch_colours, rgb
from pretrain import pictures
from pretrain.pictures import Gallery, Lens
from pretrain.reach import within_reach
from shards.errors import DataError
from shards.index import Index

SHOWN = 6  # images with neighbours, and with a look inside
NEAR = 6  # neighbours of each


def samples(page: Page, lens: Lens, fresh: Lens, index: Index, splits: Sequence[str]) -> None:
    """Everything that needs the backbone and images. fresh: it, untrained; splits: what the run was trained on."""
    selected, split = _select(index, splits)
    gallery = pictures.gather(index, pictures.choose(index, selected, _affordable(lens)), lens, fresh)
    if len(gallery) < 8:
        page.section("What the backbone sees")
        page.note(f"Left out: only {len(gallery)} images of {split} could be read, and 8 are needed.", "warn")
        return
    _map(page, gallery, split)
    _neighbours(page, gallery, index)
    _inside(page, gallery, index, lens)


def _select(index: Index, splits: Sequence[str]) -> tuple[np.ndarray, str]:
    """Held-out samples within reach if there are enough, else the ones that the run was trained on, else any."""
    for choice, words in ((["val"], "the val split"), (list(splits), "the training split")):
        try:
            selected = within_reach(index, index.select(choice))
        except DataError:
            continue
        if len(selected) >= 40:
            return selected, words
    return within_reach(index, index.select(None)), "all splits"


def _affordable(lens: Lens, most: int = 1000) -> int:
    """So many images that embedding them takes about a minute on two CPU cores; `most` on a GPU."""
    parameters = list(lens.backbone.parameters())
    work = 2 * sum(p.numel() for p in parameters) * (lens.size // lens.backbone.patch_size) ** 2
    return most if parameters[0].is_cuda else int(np.clip(2e12 // work, 100, most))


def _map(page: Page, gallery: Gallery, split: str) -> None:
    xy = pictures.flat_map(gallery.features)
    maps = []
    for title, names, least in (("By class", gallery.classes, 1), ("By source", gallery.sources, 2)):
        common = [name for name, _ in Counter(n for n in names if n is not None).most_common(12)]
        if len(common) < least:
            continue
        colours = palette(sorted(common))
        shown = [name if name in colours else None for name in names]
        rest = {("others" if len(colours) == 12 else "none given"): GREY} if None in shown else {}
        maps.append((scatter(xy, shown, colours), Markup(f"<b>{title}</b><br>{legend({**colours, **rest})}")))
    page.section(
        "Map of the embeddings",
        f"{len(gallery):,} images of {split}, rare classes first, laid out by t-SNE: images with alike features lie "
        "together. Good: islands of one class. Bad: islands of one source. Distances between islands mean nothing.",
    )
    page.figures(maps or [(scatter(xy, [None] * len(xy), {}), "No labels and a single source.")], width=440)


def _neighbours(page: Page, gallery: Gallery, index: Index) -> None:
    rows = pictures.spread_over_classes(gallery, SHOWN)
    found = pictures.nearest(gallery.features, gallery.groups, rows, NEAR)
    wanted = sorted({*map(int, rows), *(i for near in found for i, _ in near)})
    images, _ = pictures.read(index, gallery.numbers[wanted], 160)
    thumbs = {i: jpeg(rgb(image)) for i, image in zip(wanted, images, strict=True)}
    names = gallery.classes if any(gallery.classes) else gallery.sources

    def cell(i: int, query: int) -> tuple[bytes, Markup]:
        bold = i == query or (names[i] is not None and names[i] == names[query])
        name = inline(names[i] or "unlabelled")
        cosine = "" if i == query else f" {gallery.features[i] @ gallery.features[query]:.2f}"
        return thumbs[i], Markup((f"<b>{name}</b>" if bold else name) + cosine)

    page.section(
        "Nearest neighbours",
        "The most typical image of a class, and the images of other patients that the backbone finds most alike, with "
        f"their cosine. Bold: the same {'class' if names is gallery.classes else 'source'}." + _purity(gallery),
    )
    table = [[cell(int(q), int(q)), *(cell(i, int(q)) for i, _ in near)] for q, near in zip(rows, found, strict=True)]
    page.images(table, ["Image", "Most alike", *[""] * (NEAR - 1)])


def _purity(gallery: Gallery) -> str:
    """How often neighbours share the class, over all labelled images of the gallery, beside chance."""
    classes = gallery.classes
    known = np.array([i for i, c in enumerate(classes) if c is not None])
    counts = np.array(list(Counter(classes[i] for i in known).values()))
    if len(counts) < 2:
        return ""

    def share(features: np.ndarray) -> float:
        near = pictures.nearest(features, gallery.groups, known, NEAR)
        same = [classes[i] == classes[q] for q, row in zip(known, near, strict=True) for i, _ in row if classes[i]]
        return float(np.mean(same)) if same else 0.0

    return (
        f" Over all labelled images of the map {share(gallery.features):.0%} of the {NEAR} neighbours share the class; "
        f"{share(gallery.fresh):.0%} with the untrained backbone, {((counts / len(known)) ** 2).sum():.0%} by chance."
    )


def _inside(page: Page, gallery: Gallery, index: Index, lens: Lens, size: int = 224) -> None:
    rows = pictures.spread_over_classes(gallery, SHOWN)
    images, _ = pictures.read(index, gallery.numbers[rows], lens.size)
    colours = patch_colours(lens(images).patches)
    attention = cls_attention(lens.backbone.model, len(images), lambda: lens(images))
    strips = []
    for n, image in enumerate(pictures.read(index, gallery.numbers[rows], size)[0]):
        parts = [rgb(image), enlarge(colours[n], size)]
        if attention is not None:
            parts.append(glow(rgb(image), attention[n]))
        strips.append((jpeg(np.concatenate(parts, axis=1)), gallery.classes[rows[n]] or "unlabelled"))
    page.section(
        "Inside the image",
        "Left: the image. Middle: the three main directions of the patch features as red, green and blue; a colour is "
        "one kind of patch in all images, so a lesion should stand out from skin. "
        "Colour alone does some of that, with untrained weights too. "
        + ("Right: where the class token of the last block looks." if attention is not None else ""),
    )
    page.figures(strips, width=440)


def prototypes(page: Page, run: Path, checkpoint: Path, names: Sequence[str], most: int = 30) -> None:
    """How alike the class prototypes of the label head are, now and at the start, and the texts that they came from."""
    first = run / "prototypes.safetensors"
    now, start = _unit(checkpoint / "model.safetensors", "student.objectives.labels.weight"), _unit(first, "initial")
    words = _unit(first, "text")
    if now is None or len(names) != len(now):
        return
    alike = now @ now.T
    rows = np.arange(len(now))
    intro = (
        "Cosine between the class prototypes of the label head. Alike prototypes are classes that the head confuses."
    )
    if len(now) > most:
        closest = (alike - 2 * np.eye(len(now))).max(axis=1)
        rows = np.sort(np.argsort(-closest)[:most])
        intro += f" Shown are the {most} of {len(now)} classes that have the closest neighbour."
    maps, labels = [], [names[int(i)] for i in rows]
    if words is not None and len(words) == len(now):
        intro += " A text encoder finds all sentences alike; centring and whitening spread them before training starts."
        maps.append((heat_map((words @ words.T)[np.ix_(rows, rows)], labels, "In the text encoder"), ""))
    if start is not None and start.shape == now.shape:
        kept = (start * now).sum(axis=1).mean()
        intro += f" A prototype's cosine to its own start is {kept:.2f} on average" + (
            ": none has moved." if kept > 0.9999 else "."
        )
        maps.append((heat_map((start @ start.T)[np.ix_(rows, rows)], labels, "At the start"), ""))
    maps.append((heat_map(alike[np.ix_(rows, rows)], labels, "Now"), ""))
    page.section("Class prototypes", intro).figures(maps)


def _unit(path: Path, name: str) -> np.ndarray | None:
    """Unit rows [K, D] of a tensor in a file; None: it is not there."""
    try:
        with safe_open(path, "pt") as file:
            rows = file.get_tensor(name).float().numpy()
    except (OSError, SafetensorError):
        return None
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
