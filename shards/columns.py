"""The columns of an index, mapped from its safetensors file: only what is touched is read, however many rows."""

from __future__ import annotations

import json
import os
from typing import BinaryIO

import numpy as np

from shards.errors import DataError

MEMBERS = ("image", "json", "mask", "txt")  # [N, 2]: byte offset in the shard, and size; 0, 0: none
NUMBERS = ("source", "split", "label", "group", "digest")  # [N]
_DTYPES = {"I64": np.int64, "I32": np.int32, "I8": np.int8, "U8": np.uint8}


def map_columns(file: BinaryIO) -> dict[str, np.ndarray]:
    """Read-only maps of all tensors in an open file, which may be closed then. DataError names the file."""
    try:
        whole = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        if size > whole:
            raise ValueError("its first bytes are no length")
        columns = {}
        for name, entry in json.loads(file.read(size)).items():
            if name == "__metadata__":
                continue
            (begin, end), dtype, shape = entry["data_offsets"], np.dtype(_DTYPES[entry["dtype"]]), entry["shape"]
            bytes_ = dtype.itemsize
            for side in shape:  # Python's integers do not overflow
                bytes_ *= side
            if min(begin, *shape) < 0 or end - begin != bytes_ or 8 + size + end > whole:
                raise ValueError(f"column {name} does not lie in it")
            shape = tuple(shape)
            empty = not bytes_
            columns[name] = np.empty(shape, dtype) if empty else np.memmap(file, dtype, "r", 8 + size + begin, shape)
        return columns
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file.name} cannot be read ({error}): index the folder again") from None


def fit(columns: dict[str, np.ndarray], rows: int, names: dict[str, int]) -> bool:
    """Whether these are the columns of an index of so many samples, and number no more names than there are.

    `names`: how many each of the columns that number names may number. Only they are read.
    """
    shapes = dict.fromkeys(MEMBERS, (rows, 2)) | dict.fromkeys(NUMBERS, (rows,)) | {"key_at": (rows + 1,)}
    if not all(name in columns and columns[name].shape == shape for name, shape in shapes.items()):
        return False
    return not rows or all(-1 <= columns[name].min() <= columns[name].max() < count for name, count in names.items())
