"""Images of an index for a page: by number or by key, at one size."""

from __future__ import annotations

import difflib

import numpy as np

from hybridssl.errors import UserError
from hybridssl.pictures import jpeg, rgb
from hybridssl.views import resize_for_eval
from shards.format import decode
from shards.index import Index

Array = np.ndarray


def read(index: Index, numbers: Array, size: int) -> Array:
    """uint8 [N, C, size, size]. DataError for one that does not decode: what is shown was decoded before."""
    images = [decode(index.read(int(n)).image, size, index.channels) for n in numbers]
    empty = np.zeros((0, index.channels, size, size), dtype=np.uint8)
    return np.stack([resize_for_eval(image, size) for image in images]) if images else empty


def thumbnails(index: Index, numbers: Array, size: int = 144) -> list[bytes]:
    """JPEG files of the images, in that order."""
    return [jpeg(rgb(image)) for image in read(index, numbers, size)]


def numbers_of(index: Index, keys: list[str]) -> Array:
    """int64 numbers of the samples with these keys, or with keys that begin so and no other does (keys end in a hash).

    UserError for one that is not there, with the nearest.
    """
    there = [index.key(i) for i in range(len(index))]
    found = []
    for key in keys:
        own = [i for i, k in enumerate(there) if k == key] or [i for i, k in enumerate(there) if k.startswith(key)]
        if len(own) != 1:
            near = [there[i] for i in own[:4]] or difflib.get_close_matches(key, there, 3, 0.5)
            many = f"{len(own)} images whose key begins with" if own else "no image"
            raise UserError(f"{index.root} has {many} '{key}'; near: {', '.join(near) or 'none'}")
        found.append(own[0])
    return np.array(found, dtype=np.int64)
