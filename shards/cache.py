"""A folder of fetched files, named by their sha256, that never grows beyond a size. Processes may share it.

A reader holds a shared lock (flock) on the file it has open, and a memory map keeps that lock; a process that dies
loses it. What is locked is never deleted; of the rest, what was used longest ago goes first. A file is written beside
and renamed when it is whole. Meanwhile its writer holds an exclusive lock on `SHA256.SIZE.part`, so that two processes
never fetch the same file at once, and what is being fetched counts towards the size from the start. (That is a file of
its own: whoever waits for the lock must not wait for the readers of what the written file became.)
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO

from shards.errors import FetchError

FOLDER = Path("~/.cache/hybridssl/shards")
SIZE = "50GB"
OBJECT = re.compile(r"[0-9a-f]{64}(\.(?P<size>\d+)\.part)?")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class CacheFull(FetchError):
    """There is no room, since all that is there is in use."""


class Cache:
    """`size` bytes at most in `folder`; without: HYBRIDSSL_CACHE and HYBRIDSSL_CACHE_SIZE, else FOLDER and SIZE."""

    def __init__(self, folder: str | Path = "", size: str = ""):
        self.folder = Path(folder or os.environ.get("HYBRIDSSL_CACHE") or FOLDER).expanduser().absolute()
        self.size = parse_size(size or os.environ.get("HYBRIDSSL_CACHE_SIZE") or SIZE)

    def open(self, sha256: str, size: int, fetch: Callable[[Path], None], wait: bool = True) -> BinaryIO | None:
        """The file with that digest, open for reading, and safe from deletion while it, or a map of it, is open.

        `fetch(path)` writes it if it is not here, and raises if it cannot. None if another process is fetching it and
        `wait` is off. Raises CacheFull.
        """
        if size > self.size:
            raise CacheFull(
                f"the cache {self.folder} may grow to {self.size / 1e9:,.2f} GB, and one shard has {size / 1e9:,.2f}: "
                "give it more with data.cache_size or HYBRIDSSL_CACHE_SIZE"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{sha256}.{size}.part"
        while True:
            if (file := self._held(sha256)) is not None:
                return file
            written = part.with_suffix(".new")
            with part.open("ab") as writing:
                if not _lock(writing, fcntl.LOCK_EX, wait):
                    return None
                if not _is_at(writing, part):  # another process has finished it, or deleted it, while this one waited
                    continue
                try:
                    if not self.has(sha256):  # it came between the look above and the lock
                        self._make_room()
                        fetch(written)
                        os.replace(written, self.folder / sha256)
                finally:
                    written.unlink(missing_ok=True)
                    part.unlink(missing_ok=True)

    def has(self, sha256: str) -> bool:
        return (self.folder / sha256).is_file()

    def _held(self, sha256: str) -> BinaryIO | None:
        path = self.folder / sha256
        while True:
            try:
                file = path.open("rb")
            except FileNotFoundError:
                return None
            _lock(file, fcntl.LOCK_SH, wait=True)
            if _is_at(file, path):
                os.utime(path)  # used just now
                return file
            file.close()  # deleted between the two calls

    def _make_room(self) -> None:
        """Delete what was used longest ago until everything, files being fetched included, fits. Raises CacheFull."""
        with (self.folder / "lock").open("ab") as alone:
            _lock(alone, fcntl.LOCK_EX, wait=True)
            found = []
            for path in self.folder.iterdir():
                match = OBJECT.fullmatch(path.name)
                if match and (about := _stat(path)):
                    found.append((about.st_mtime_ns, int(match["size"] or about.st_size), path))
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if total <= self.size:
                    return
                if _delete_unless_used(path):
                    total -= size
            if total > self.size:
                raise CacheFull(
                    f"the cache {self.folder} is full of shards in use ({self.size / 1e9:,.2f} GB): give it more with "
                    "data.cache_size or HYBRIDSSL_CACHE_SIZE, or lower stream.window"
                )


def parse_size(text: str) -> int:
    """`50GB`, `800 MB` or `1e9` -> bytes. FetchError for anything else."""
    match = re.fullmatch(r"\s*([\d.e]+)\s*([KMGT]?B)?\s*", text, re.IGNORECASE)
    try:
        assert match
        return int(float(match[1]) * _UNITS[(match[2] or "").upper()])
    except (AssertionError, ValueError, OverflowError):
        raise FetchError(f"a cache of size {text!r}: write it like 50GB or 800MB") from None


def _lock(file: IO, kind: int, wait: bool) -> bool:
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: IO, path: Path) -> bool:
    """Whether the open file is what lies at the path now."""
    about = _stat(path)
    return about is not None and os.path.samestat(os.fstat(file.fileno()), about)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _delete_unless_used(path: Path) -> bool:
    try:
        with path.open("r+b") as file:
            if not _lock(file, fcntl.LOCK_EX, wait=False):
                return False
            path.with_suffix(".new").unlink(missing_ok=True)  # of a writer that died
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    return True
