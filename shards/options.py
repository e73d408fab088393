"""What a build may be told: one frozen dataclass, checked once, so that every part of the build can rely on it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any

from shards.errors import DataError
from shards.format import MAX_CHANNELS
from shards.privacy import Salt
from shards.split import parse_split

FOLDER_ROLES = ("label", "split", "source", "group", "-")
_APART = ("workers", "overwrite", "part", "salt")  # these do not change what is written, or must not be written


@dataclass(frozen=True)
class BuildOptions:
    """How images are found, read and packed. DataError for a value that makes no sense."""

    columns: dict[str, str] = field(default_factory=dict)  # role -> column, where it is not called like the role
    folders: str = ""  # what the folders below the images mean, from the top: "label", "split/label", "source/-/group"
    source: str = ""  # of images for which neither the table nor a folder names one
    shard_size: str = "256MB"  # of a shard, about: "256MB", or a number of files
    short_side: int = 0  # shrink to this short side; 0 keeps the bytes as they come
    quality: int = 92  # of the JPEG that a shrunken image of 8 bits becomes
    channels: int = 3
    bits: int = 0  # how many bits 16-bit images use; 0: by the largest value of each
    stack: bool = False  # the frames (or pages) of a file are the channels of one image
    slices: str = ""  # what files have in common that are channels of one image: "series", "folder", or a column
    frames: int = 0  # at most so many frames of a file, evenly spread (or so many slices); 0: all
    window: str = "file"  # of DICOM: the file's own, "full", or "CENTRE,WIDTH" in its rescaled units
    tags: tuple[str, ...] = ()  # DICOM tags for meta, beside the usual ones
    salt: str = field(default="", repr=False)  # with it, identifiers (groups, paths, UIDs) are stored hashed
    keep_paths: bool = False  # store the paths of files although there is a salt
    keep_burned_in: bool = False  # pack DICOM images that say that text is burnt into their pixels
    split: str = ""  # "70/10/20": split by hash instead of by the table
    by: str = ""  # the column whose values stay together in a split; "": group where there is one, else the image
    split_seed: int = 0
    stratify: bool = False  # split every class in these shares
    keep_splits: str = ""  # an index whose patients stay in their splits
    drop_duplicates: str = ""  # "exact": images with the same pixels; or the path of an audit.json
    part: tuple[int, int] = (1, 1)  # the i-th of n parts
    workers: int = 0  # cores to use; 0: all
    overwrite: bool = False

    def __post_init__(self) -> None:
        def need(good: bool, message: str) -> None:
            if not good:
                raise DataError(message)

        rows_or_bytes(self.shard_size)
        shares = parse_split(self.split) if self.split else []
        need(bool(shares) or not (self.by or self.stratify or self.keep_splits), "--by, --stratify and --keep-splits "
             "say how to --split: add for example --split 70/10/20")  # fmt: skip
        need(self.stratify or not self.keep_splits, "--keep-splits goes with --stratify: without it a patient's split "
             "hangs on nothing but their name and --split-seed, and stays as it is")  # fmt: skip
        unknown = [name for name in self.levels if name not in FOLDER_ROLES]
        need(not unknown, f"--folders {self.folders}: a level is one of {', '.join(FOLDER_ROLES)}, as in split/label")
        need(1 <= self.channels <= MAX_CHANNELS, f"--channels {self.channels}: 1 to {MAX_CHANNELS} can be read")
        need(self.bits in (0, *range(9, 17)), f"--bits {self.bits}: 16-bit images use 9 to 16 bits")
        need(1 <= self.quality <= 100, f"--quality {self.quality}: JPEG knows 1 to 100")
        need(min(self.short_side, self.frames, self.workers) >= 0, "--short-side, --frames and --workers are 0 or more")
        number, of = self.part
        need(1 <= number <= of, f"--part {number}/{of}: parts count from 1, as in 3/8")
        if self.salt:
            Salt(self.salt)
        if self.window not in ("file", "full"):
            self.window_range()

    @property
    def levels(self) -> tuple[str, ...]:
        return tuple(self.folders.split("/")) if self.folders else ()

    def window_range(self) -> tuple[float, float]:
        """(centre, width) of a window given in numbers."""
        match = re.fullmatch(r"\s*(-?[\d.]+)\s*,\s*([\d.]+)\s*", self.window)
        try:
            centre, width = (float(part) for part in match.groups()) if match else (0.0, 0.0)
        except ValueError:
            width = 0.0
        if width <= 0:
            raise DataError(f"--window {self.window}: write file, full, or CENTRE,WIDTH such as 40,400")
        return centre, width

    def digest(self) -> bytes:
        """Of all that decides which bytes are written. The salt counts with 16 bits only: too few to guess it from."""
        values: dict[str, Any] = {k: v for k, v in asdict(self).items() if k not in _APART}
        check = Salt(self.salt).hash("check", "")[:4] if self.salt else ""
        return blake2b(repr((sorted(values.items()), check)).encode(), digest_size=16).digest()


def rows_or_bytes(shard_size: str) -> tuple[int, int]:
    """`--shard-size` as (most files, most bytes) of a shard."""
    match = re.fullmatch(r"(\d+)\s*([kmg]b)?", shard_size.strip().lower())
    if not match or not int(match[1]):
        raise DataError(f"--shard-size {shard_size}: write a size such as 256MB, or a number of images such as 1000")
    if not match[2]:
        return int(match[1]), 1 << 62
    return 1 << 62, int(match[1]) * {"kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}[match[2]]
