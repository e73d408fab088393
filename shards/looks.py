"""What the audit keeps of every image after decoding it once: size, fingerprint of the pixels, thumbnail, rim.

A thumbnail takes 4 KiB, so a million images take 4 GiB; they lie in a temporary file that the system pages in and out.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np

from shards.errors import DataError
from shards.format import decode, hash64
from shards.hashes import SIDE, texture, thumbnail
from shards.index import Index
from shards.rims import RIMS, rim

CONSTANT = 2  # levels of 255 between the darkest and the brightest value: what JPEG makes of a single colour
PLAIN = 1.5  # grey levels of texture below which pictures are too plain to be told apart

Array = np.ndarray


@dataclass(frozen=True)
class Looks:
    """One row a sample, in the order of the index; rows that are not `readable` are 0."""

    readable: Array  # bool [N]
    size: Array  # int32 [N, 2]: height, width as decoded, upright
    pixels: Array  # int64 [N]: hash of the decoded pixels
    constant: Array  # bool [N]: one colour all over
    telling: Array  # bool [N]: readable, with details enough to be told from others
    rim: Array  # int8 [N]: number in RIMS
    thumbs: Array  # uint8 [N, SIDE, SIDE], grey
    reasons: dict[int, str]  # of what is not readable

    def __len__(self) -> int:
        return len(self.readable)


def look(index: Index, progress: Callable[[int, int], None] = lambda done, total: None) -> Looks:
    """Decode every image of an index once."""
    count = len(index)
    looks = Looks(
        readable=np.zeros(count, bool),
        size=np.zeros((count, 2), np.int32),
        pixels=np.zeros(count, np.int64),
        constant=np.zeros(count, bool),
        telling=np.zeros(count, bool),
        rim=np.zeros(count, np.int8),
        thumbs=np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=(count, SIDE, SIDE)),  # noqa: SIM115
        reasons={},
    )

    reading = Lock()  # a shard that another thread is reading must not be let go of

    def one(i: int) -> None:
        try:
            with reading:
                sample = index.read(i)
            image = decode(sample.image, 0, index.channels)
        except DataError as error:
            looks.reasons[i] = str(error)
            return
        looks.size[i] = image.shape[:2]
        looks.pixels[i] = hash64(repr(image.shape).encode() + image.tobytes())
        looks.constant[i] = int(image.max()) - int(image.min()) <= CONSTANT
        looks.thumbs[i] = thumbnail(image)
        looks.telling[i] = texture(looks.thumbs[i]) >= PLAIN
        looks.rim[i] = RIMS.index("" if looks.constant[i] else rim(looks.thumbs[i], *image.shape[:2]))
        looks.readable[i] = True

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for done, _ in enumerate(pool.map(one, range(count)), 1):
            progress(done, count)
    return looks
