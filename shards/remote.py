"""An index at an address (s3://, gs://, hf://, https://): its files, fetched into the cache and checked.

Everything goes through fsspec, so credentials and endpoints are set as for its drivers (AWS_PROFILE,
AWS_ENDPOINT_URL_S3, FSSPEC_S3_ANON, HF_TOKEN ...). No address, no network: nothing here is imported for a folder.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.callbacks import Callback

from shards import address
from shards.cache import Cache, CacheFull
from shards.errors import FetchError

T = TypeVar("T")

TRIES, FIRST_TRIES = 8, 4  # of a shard, and of the first file: a mistyped address should not take a minute
PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds after the first failure, doubled after each
HEADER_BYTES = 1 << 28  # of index.json, whose size nothing tells beforehand
SILENCE = 60  # seconds without a byte after which a connection counts as dead
FULL_WAIT = 120.0  # seconds for other processes to leave a shard, when the cache is full of shards in use


class Remote:
    """The files below `url`, as if they lay on this machine. Picklable, and safe after fork."""

    def __init__(self, url: str, cache: Cache | None = None):
        self.address, self.cache = address.whole(url), cache or Cache()
        self.url = address.public(self.address)  # as it is told
        self.folder = self.cache.folder / "at" / sha256(self.url.encode()).hexdigest()[:16]
        self._forget()

    def small(self, name: str, needed: bool = True) -> None:
        """Fetch a small file anew into `folder`. Raises FetchError, unless it is not there, nor `needed`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{name}.{os.getpid()}.part"
        try:
            self._get(name, part, HEADER_BYTES, FIRST_TRIES)
            os.replace(part, self.folder / name)
        except NotThere:
            if needed:
                raise
            (self.folder / name).unlink(missing_ok=True)
        finally:
            part.unlink(missing_ok=True)

    def open(
        self, name: str, digest: str, size: int | None = None, release: Callable[[], bool] = lambda: False
    ) -> BinaryIO:
        """A file of known digest, open for reading, and locked in the cache for as long as it, or a map of it, is open.

        Where the cache is full of files in use, `release` gives back one of the caller's own (False: it has none), and
        then those of other processes are waited for. Raises FetchError.
        """
        until = time.monotonic() + FULL_WAIT
        while True:
            try:
                return self._open(name, digest, size, wait=True)  # type: ignore[return-value]
            except CacheFull:
                if (size or 0) > self.cache.size or (not release() and time.monotonic() > until):
                    raise
                time.sleep(0.05)

    def size(self, name: str) -> int:
        return self._patiently(name, lambda fs, path: int(fs.info(path).get("size") or 0), FIRST_TRIES)

    def ahead(self, wanted: Sequence[tuple[str, str, int]]) -> None:
        """Fetch these (name, sha256, size) in the background, the first first, in place of what was asked before."""
        room, fits = self.cache.size // 2, []
        for name, digest, size in wanted:
            room -= size
            if room >= 0:  # more would push out what is about to be read
                fits.append((name, digest, size))
        if fits == self._wanted:
            return
        self._wanted = fits
        if self._pid != os.getpid():  # threads do not survive a fork
            self._pid, self._wake = os.getpid(), threading.Event()
            threading.Thread(target=self._fetch_ahead, daemon=True).start()
        self._wake.set()

    def _fetch_ahead(self) -> None:
        while self._wake.wait():
            self._wake.clear()
            for name, digest, size in list(self._wanted):
                if self._wake.is_set():
                    break
                if not self.cache.has(digest):
                    with contextlib.suppress(FetchError, OSError):  # whoever needs it will meet the same, and say so
                        if file := self._open(name, digest, size, wait=False):
                            file.close()

    def _open(self, name: str, digest: str, size: int | None, wait: bool) -> BinaryIO | None:
        if not re.fullmatch("[0-9a-f]{64}", digest):  # it becomes a file name
            raise FetchError(f"{self.url}/index.json gives no sha256 for {name}: index the folder again")
        if size is None and not self.cache.has(digest):
            size = self.size(name)
        return self.cache.open(digest, size or 0, lambda part: self._get(name, part, size, TRIES, digest), wait)

    def _get(self, name: str, to: Path, size: int | None, tries: int, digest: str = "") -> None:
        def get(fs: Any, path: str) -> None:
            fs.get_file(path, str(to), callback=_Bounded(size or self.cache.size))
            if digest and (there := to.stat().st_size) != (size or there):
                raise OSError(f"it has {there:,} bytes where {size:,} were expected")
            if digest and _sha256(to) != digest:
                raise OSError("its sha256 is not that of the index: the file was changed, or damaged on its way")

        self._patiently(name, get, tries)

    def _patiently(self, name: str, work: Callable[[Any, str], T], tries: int) -> T:
        """`work(file system, path)`, tried again after growing pauses, of random length: else all come back at once."""
        there = address.below(self.address, name)
        url = address.public(there)
        reason = ""
        for attempt in range(tries):
            if attempt:
                pause = min(LONGEST_PAUSE, PAUSE * 2 ** (attempt - 1))
                time.sleep(pause * random.SystemRandom().uniform(0.5, 1))
            try:
                return work(*fsspec.core.url_to_fs(there, **_options(there)))
            except Exception as error:  # every driver has its own
                error.__traceback__ = None  # fsspec makes it a cycle, in which our caller's maps would keep their locks
                said = address.hushed(str(error), self.address)
                _raise_if_lasting(error, url, said)
                reason = f"{type(error).__name__}: {said}"
        raise FetchError(f"{url} could not be fetched in {tries} tries; the last failed with {reason}")

    def _forget(self) -> None:
        self._wanted: list[tuple[str, str, int]] = []
        self._wake, self._pid = threading.Event(), 0

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "url": self.url, "cache": self.cache, "folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class NotThere(FetchError):
    """There is no such file, or it may not be read."""


def _raise_if_lasting(error: Exception, url: str, said: str) -> None:
    """FetchError for what another try does not mend."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        raise NotThere(f"{url} does not exist: is the address right?") from None
    if isinstance(error, PermissionError) or status in (401, 403):
        what = f"access was refused ({status or said})"
        raise NotThere(f"{url} may not be read, or is not there: {what}; check address and credentials") from None
    if isinstance(error, ImportError):
        name = "gs" if url.startswith("gs") else "s3"
        raise FetchError(f"{url} needs another package ({said}): pip install 'hybridssl[{name}]'") from None


def _status(error: Exception) -> int | None:
    """Of HTTP, as aiohttp (https://) tells it, or as requests and httpx (hf://) do."""
    return getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)


class _Bounded(Callback):
    """Ends a transfer that brings more bytes than it should."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def call(self, *_: Any, **__: Any) -> None:
        if self.value > self.most:
            raise OSError(f"it brings more than {self.most:,} bytes")


def _options(url: str) -> dict[str, Any]:
    if not url.startswith("http"):
        return {}
    from aiohttp import ClientTimeout  # its default ends any transfer after five minutes

    return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)}}


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
