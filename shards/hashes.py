"""Is one picture another one resized, re-encoded, flipped, turned or cropped? A hash proposes, pixels decide.

The hash holds the signs of the lowest 12 x 12 coefficients of a cosine transform (as in pHash, Zauner 2010, without its
median): a flip changes the sign of the odd ones and a turn transposes them, so all eight orientations cost one
transform. Crops are met by asking for ten views of every picture: the whole, and nine windows of it.
Proposals are then laid over each other, and the correlation of their details decides. Both thresholds are measured
(benchmarks/audit.py): on planted copies, and on pictures of different lesions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import faiss
import numpy as np

SIDE = 64  # px of a thumbnail, whatever the aspect ratio was
LOW = 12  # coefficients a direction: 144 bits, of which the first (brightness) is always 0
WINDOW = 0.92  # side of the nine windows: between a crop of 95 % and one of 90 %
FAR = 32  # bits of 143 up to which two views may be the same picture
NEAREST = 4  # pictures that a view proposes at most
FINE = 1.2  # px of a thumbnail: width of the blur that details stand out from
AGREE = 0.6  # correlation of details from which two pictures are one
AGREE_WIDE = 0.65  # the same where every orientation and heavier crops were tried, which finds more by chance
COARSE, ALIKE = 16, 0.85  # px, and correlation there below which details are not looked at: copies reach .87 and more
EXACT_SEARCH = 100_000  # pictures up to which every hash is compared; above, those of the nearest cells are
CHUNK = 4096  # pictures whose views are held at a time
SCALES = (1.0, 0.975, 0.95, 0.925, 0.9)
BROAD = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)
WIDE = (*SCALES, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
ORIENTATIONS = range(8)  # bit 0: mirrored left to right, bit 1: top to bottom, bit 2: transposed first

Array = np.ndarray


def thumbnail(image: Array) -> Array:
    """uint8 [H, W, C] -> grey uint8 [SIDE, SIDE], stretched: turns and flips keep it square."""
    grey = image.mean(axis=2) if image.shape[2] != 3 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA).round().astype(np.uint8)


def texture(thumb: Array) -> float:
    """How strong the structures of a thumbnail are, in grey levels: standard deviation without what is broad."""
    return float((thumb - cv2.GaussianBlur(thumb.astype(np.float32), (0, 0), SIDE / 16)).std())


def details(thumb: Array) -> Array:
    """uint8 [S, S] -> float32 [S, S]: fine structure at a local contrast of 1.

    Every region counts alike. Without that two round dark lesions correlate up to .92, however unlike they are.
    """
    fine = thumb - cv2.GaussianBlur(thumb.astype(np.float32), (0, 0), FINE)
    return fine / (np.sqrt(cv2.GaussianBlur(fine * fine, (0, 0), 2 * FINE)) + 1)


def hashes(thumbs: Array) -> Array:
    """uint8 [N, SIDE, SIDE] -> uint8 [N, 18]: the hash of each as it stands."""
    return _bits(_spectrum(thumbs), 0)


def propose(
    asked: Array,
    known: Array,
    itself: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Array:
    """Which of `known` (hashes [M, 18]) may show what a picture of `asked` (thumbnails [N, S, S]) shows.

    int64 [P, 3]: row of asked, row of known, orientation that turns the first into the second; each pair once, at its
    nearest. itself: both are the same pictures, and none is proposed for itself.
    """
    if not len(asked) or not len(known):
        return np.empty((0, 3), np.int64)
    search = _searcher(known)
    found = []
    for start in range(0, len(asked), CHUNK):
        part = asked[start : start + CHUNK]
        for view in _windows(part):
            spectrum = _spectrum(view)
            for turn in ORIENTATIONS:
                distance, rows = search.search(_bits(spectrum, turn), min(NEAREST + itself, len(known)))
                at, column = np.nonzero((distance <= FAR) & (rows >= 0))
                hits = np.stack(
                    [at + start, rows[at, column], np.full(len(at), turn), distance[at, column]], axis=1
                ).astype(np.int64)
                found.append(hits[hits[:, 0] != hits[:, 1]] if itself else hits)
        progress(start + len(part), len(asked))
    every = np.concatenate(found)
    every = every[np.lexsort((every[:, 3], every[:, 1], every[:, 0]))]
    _, first = np.unique(every[:, :2], axis=0, return_index=True)
    return every[first, :3]


def agreement(outer: Array, inner: Array, scales: Sequence[float] = SCALES) -> float:
    """The highest correlation of details [S, S] with those of another laid whole inside them, at any of `scales`."""
    best = -1.0
    for scale in scales:
        side = round(len(inner) * scale)
        small = cv2.resize(inner, (side, side), interpolation=cv2.INTER_AREA)
        best = max(best, float(cv2.matchTemplate(outer, small, cv2.TM_CCOEFF_NORMED).max()))
    return best


def agreement_any_way(a: Array, b: Array) -> float:
    """The same for thumbnails [S, S], over all orientations, down to WIDE crops, and with either inside the other.

    -1 where not even their broad shapes agree, which a look at COARSE pixels tells in a tenth of the time.
    """
    best = -1.0
    for turn in ORIENTATIONS:
        way = turned(a, turn)
        for outer, inner in ((way, b), (b, way)):
            if agreement(_coarse(outer), _coarse(inner), BROAD) >= ALIKE:
                best = max(best, agreement(details(outer), details(inner), WIDE))
    return best


def _coarse(thumb: Array) -> Array:
    return cv2.resize(thumb, (COARSE, COARSE), interpolation=cv2.INTER_AREA).astype(np.float32)


def turned(image: Array, turn: int) -> Array:
    """A square picture [S, S] in one of eight ORIENTATIONS."""
    image = image.T if turn & 4 else image
    image = image[::-1] if turn & 2 else image
    return np.ascontiguousarray(image[:, ::-1] if turn & 1 else image)


def _windows(thumbs: Array) -> Iterator[Array]:
    """The pictures themselves, then nine windows of them."""
    yield thumbs
    side = round(SIDE * WINDOW)
    for y in (0, (SIDE - side) // 2, SIDE - side):
        for x in (0, (SIDE - side) // 2, SIDE - side):
            yield np.stack([cv2.resize(t[y : y + side, x : x + side], (SIDE, SIDE)) for t in thumbs])


def _spectrum(thumbs: Array) -> Array:
    """uint8 [N, S, S] -> the LOW x LOW lowest coefficients of the cosine transform (DCT-II), float32."""
    at = np.arange(thumbs.shape[-1])
    basis = np.cos(np.pi * np.arange(LOW)[:, None] * (2 * at + 1) / (2 * len(at))).astype(np.float32)
    return basis @ thumbs.astype(np.float32) @ basis.T


def _bits(spectrum: Array, turn: int) -> Array:
    """Spectra [N, LOW, LOW] of pictures -> hashes [N, 18] of the same pictures `turned`."""
    odd = np.where(np.arange(LOW) % 2, -1, 1)
    signs = (odd if turn & 2 else np.ones(LOW))[:, None] * (odd if turn & 1 else np.ones(LOW))[None]
    signs[0, 0] = 0
    turned_spectrum = spectrum.swapaxes(1, 2) if turn & 4 else spectrum
    return np.packbits((turned_spectrum * signs > 0).reshape(len(spectrum), -1), axis=1)


def _searcher(known: Array) -> Any:
    """A faiss index over hashes: every one compared, or, of very many, those in the cells nearest to a question."""
    bits = 8 * known.shape[1]
    if len(known) <= EXACT_SEARCH:
        search: Any = faiss.IndexBinaryFlat(bits)
    else:
        cells = 4 * math.isqrt(len(known))
        search = faiss.index_binary_factory(bits, f"BIVF{cells}")
        search.train(known[np.random.default_rng(0).permutation(len(known))[: 40 * cells]])
        search.nprobe = 32
    search.add(known)
    return search
