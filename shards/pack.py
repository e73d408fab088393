"""One file becomes the samples that are written, or the reason why not. Runs in a worker process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np

from shards import readers
from shards.encode import encode, shrink
from shards.errors import DataError
from shards.format import decode, extension, hash64, mask_values, short_side
from shards.options import BuildOptions
from shards.sources import Frame, choose, error_name, fill_bits, frames
from shards.split import parse_split, split_of
from shards.table import Row

# Columns and DICOM tags that hold the length of a pixel.
_LENGTHS = ("mm_per_pixel", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")


@dataclass(frozen=True)
class Packed:
    """A sample ready to be written."""

    key: str
    members: dict[str, bytes]
    pixels: int = 0  # a digest of the decoded image, where duplicates are looked for


@dataclass
class Result:
    """What became of one file."""

    samples: list[Packed] = field(default_factory=list)
    bad: list[dict[str, str]] = field(default_factory=list)  # path, reason
    dropped: int = 0  # samples that the audit calls superfluous


def pack(row: Row, options: BuildOptions, drop: frozenset[str] = frozenset()) -> Result:
    """`drop`: keys to leave out. Raises nothing: a file that cannot be read is no reason to stop."""
    result = Result()
    try:
        for image in _images(row, options):
            key = key_of(row.name) + (f"-{image.number:05d}" if image.count > 1 else "")  # file_key undoes it
            if key in drop:
                result.dropped += 1
                continue
            pixels = _pixels(image.stored, options.channels) if options.drop_duplicates == "exact" else 0
            result.samples.append(Packed(key, _members(row, options, image), pixels))
    except DataError as error:
        result.bad.append({"path": row.name, "reason": str(error)})
    except Exception as error:  # what no one foresaw; its words may quote the file
        result.bad.append({"path": row.name, "reason": f"it cannot be read ({error_name(error)})"})
    return result


def key_of(name: str) -> str:
    """A WebDataset key (no dot, ASCII, unique) from a path: its readable part and a hash of the whole."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", PurePosixPath(name).stem)[:48].strip("_") + "-" + name_digest(name)[:10]


def file_key(key: str) -> str:
    """`key_of` the file that a sample comes from: without the number of its frame or page."""
    return re.sub(r"(-[0-9a-f]{10})-\d{5,9}$", r"\1", key)


def name_digest(name: str) -> str:
    return blake2b(name.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class _Image:
    """One image of a file, as it is stored."""

    number: int
    count: int  # of images in the file
    stored: bytes
    said: dict[str, Any]  # group and meta
    size: tuple[int, int] = (0, 0)  # height and width, where a short side was asked for
    shrunk: float = 1.0  # its short side before, over that of now


def _images(row: Row, options: BuildOptions) -> Iterator[_Image]:
    if row.slices:
        parts, said = _slices(row, options)
        yield from _encoded(((n, len(parts), part) for n, part in enumerate(parts)), options, said)
        return
    data = _read(row.image)
    if reader := readers.of(data, row.image.suffix):
        opened = reader.read(data, options)
        yield from _encoded(opened.frames, options, {"group": opened.group, "meta": opened.meta})
    elif _as_it_is(data, options):
        image = decode(data, options.short_side or 1, options.channels)  # at scale 1/8 every byte is still parsed
        if not options.short_side:
            yield _Image(0, 1, data, {})
            return
        image = shrink(image, options.short_side)
        stored = encode(Frame(image), options.quality)
        yield _Image(0, 1, stored, {}, image.shape[:2], short_side(data) / min(image.shape[:2]))
    else:
        yield from _encoded(frames(data, options.channels, options.frames, options.bits), options, {})


def _as_it_is(data: bytes, options: BuildOptions) -> bool:
    """Whether the stream reads these very bytes, or an 8-bit image of them is all that is wanted."""
    try:
        plain = extension(data) != "tif"
    except DataError:
        return False
    wide = data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:26] == b"\x10\0"  # 16 bits of grey
    changed = bool(options.short_side) and (wide or options.channels not in (1, 3))
    return plain and not options.stack and not changed and not (wide and options.bits)


def _slices(row: Row, options: BuildOptions) -> tuple[list[Frame], dict[str, Any]]:
    """The slices of an image, grey (DICOM through its window), and the patient and tags of the first.

    DataError, with the number of the slice, when one cannot be read, and when they show several patients."""
    parts: list[Frame] = []
    told: list[dict[str, Any]] = []
    named = not options.salt or options.keep_paths
    for number in choose(len(row.slices), options.frames):
        path = row.slices[number]
        try:
            data = _read(path)
            if reader := readers.of(data, path.suffix):
                opened = reader.read(data, options)
                told.append({"group": opened.group, "meta": opened.meta})
                found = opened.frames
            else:
                found = frames(data, channels=1, bits=options.bits)
            parts += [frame for _, _, frame in found]
        except DataError as error:
            name = f" ({path.name})" if named else ""
            raise DataError(f"slice {number + 1} of {len(row.slices)}{name}: {error}") from None
    if len({said["group"] for said in told}) > 1:
        raise DataError(f"its {len(row.slices)} slices are of several patients: stack them --slices by something else")
    return parts, told[0] if told else {}


def _encoded(found: Iterator[tuple[int, int, Frame]], options: BuildOptions, said: dict[str, Any]) -> Iterator[_Image]:
    stack = options.stack or bool(options.slices)
    if stack:
        found = _stacked(found)
    for number, count, frame in found:
        planes = frame.pixels.shape[2]
        grey_or_rgb = planes in (1, 3) and options.channels in (1, 3) and not stack
        if planes != options.channels and not grey_or_rgb:
            hint = f"; its {count} frames are, with --stack" if planes * count == options.channels else ""
            hint = f"; --frames {options.channels} takes so many" if stack and planes > options.channels else hint
            raise DataError(f"an image of {planes} planes where --channels says {options.channels}{hint}")
        small = shrink(frame.pixels, options.short_side)
        stored = encode(fill_bits(Frame(small, frame.full), options.bits), options.quality * bool(options.short_side))
        size = small.shape[:2] if options.short_side else (0, 0)
        yield _Image(number, count, stored, said, size, min(frame.pixels.shape[:2]) / min(small.shape[:2]))


def _stacked(found: Iterator[tuple[int, int, Frame]]) -> Iterator[tuple[int, int, Frame]]:
    parts = [frame for _, _, frame in found]
    kinds = {(part.pixels.shape[:2], part.pixels.dtype, part.full) for part in parts}
    if len(kinds) != 1:
        sizes = sorted({f"{width} x {height}, {8 * dtype.itemsize} bits" for (height, width), dtype, _ in kinds})
        raise DataError(
            f"{len(parts)} slices or frames of several sizes or depths cannot be the channels of one image: "
            f"{'; '.join(sizes[:4])}{' ...' if len(sizes) > 4 else ''}"
        )
    yield 0, 1, Frame(np.concatenate([part.pixels for part in parts], axis=2), parts[0].full)


def _members(row: Row, options: BuildOptions, image: _Image) -> dict[str, bytes]:
    meta = _stretched(row.meta | image.said.get("meta", {}), image.shrunk) | {"path": row.name}
    # Where no patient is known, the frames of a study, or of a file, stay together all the same.
    group = row.group or image.said.get("group") or meta.get("study", "") or (row.name if image.count > 1 else "")
    split = row.split
    if options.split and not options.stratify:
        by = (_by_meta(options) and meta.get(options.by)) or group
        split = split_of(str(by or row.name), parse_split(options.split), options.split_seed)
    labels = row.labels
    about = {
        "label": None if not labels else labels[0] if len(labels) == 1 else list(labels),
        "source": row.source,
        "group": group,
        "split": split,
        "meta": meta,
    }
    told = json.dumps(about, ensure_ascii=False, sort_keys=True).encode()
    members = {extension(image.stored): image.stored, "json": told}
    if row.text:
        members["txt"] = row.text.encode()
    if row.mask is not None:
        members["mask.png"] = _mask(row.mask, image.size if any(image.size) else None)
    return members


def _stretched(meta: dict[str, Any], shrunk: float) -> dict[str, Any]:
    """The lengths of a pixel are given for the file; those of the stored image are longer by as much as it shrank."""
    return meta if shrunk == 1 else meta | {name: _times(meta[name], shrunk) for name in _LENGTHS if name in meta}


def _times(value: Any, factor: float) -> Any:
    """A number, a text that is one, or each of a list; other text stays as it is, for whoever reads it to refuse."""
    if isinstance(value, list):
        return [_times(part, factor) for part in value]
    try:
        return f"{float(value) * factor:.9g}" if isinstance(value, str) else value * factor
    except ValueError:
        return value


def _by_meta(options: BuildOptions) -> bool:
    return bool(options.by) and options.by != options.columns.get("group", "group")


def _mask(path: Path, size: tuple[int, int] | None) -> bytes:
    """The mask as PNG: its numbers as they are, of a JPEG or WebP black and white; of a shrunken image as small."""
    try:
        data = _read(path)
        kind = extension(data)
        values = mask_values(data) if kind in ("png", "tif") else (decode(data, 0, 1)[..., 0] > 127) * 255  # JPEG rings
    except DataError as error:
        raise DataError(f"its mask: {error}") from None
    if kind == "png" and size is None:
        return data
    mask = values.astype(np.uint16 if values.max(initial=0) > 255 else np.uint8)
    if not np.array_equal(mask, values):
        raise DataError("its mask has other numbers than 0, 1, ... 65535: those of its regions")
    if size is not None and abs(mask.shape[0] * size[1] - mask.shape[1] * size[0]) > max(*mask.shape, *size):
        raise DataError(f"its mask is {mask.shape[1]} x {mask.shape[0]}, and the image has another shape")
    if size is not None and mask.shape != size:
        mask = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)
    return cv2.imencode(".png", mask)[1].tobytes()


def _pixels(stored: bytes, channels: int) -> int:
    image = decode(stored, 0, channels)
    return hash64(repr(image.shape).encode() + image.tobytes())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}") from None
