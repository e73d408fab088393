"""The index of a folder of tars: where each member lies, and what is known of each sample, as mapped columns.

`index.json` holds what is small, `index.safetensors` the columns (one row a sample, in shard order, then in the order
of the tar). Two files because ten million samples must open at once, which JSON cannot. The folder may be an address
(s3://, gs://, hf://, https://), whose files come through a cache (remote.py, cache.py).
"""

from __future__ import annotations

import json
import mmap
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from shards.address import ADDRESS
from shards.cells import cell, labels_of
from shards.columns import MEMBERS, fit, map_columns
from shards.errors import DataError
from shards.format import FORMAT, MAX_CHANNELS, VERSION, Sample

if TYPE_CHECKING:  # a folder needs no network
    from shards.cache import Cache
    from shards.remote import Remote

OPEN_SHARDS = 64  # maps kept open a process; a map costs address space, not memory


class Index:
    """Random access to the samples of a folder. Picklable, and safe after fork: every process maps for itself."""

    def __init__(self, root: Path, header: dict[str, Any], digest: str, remote: Remote | None = None):
        self.root = root  # of an address, the folder with the copy of its index.json and classes.csv
        self.remote = remote
        self.header = header
        self.sha256 = digest  # of index.json, which holds the digests of all else
        self.sources: tuple[str, ...] = tuple(header["sources"])
        self.vocabulary: dict[str, list[str]] = header["vocabulary"]
        self.classes: tuple[str, ...] = tuple(sorted({name for names in self.vocabulary.values() for name in names}))
        self._known = frozenset(self.classes)
        self.splits: tuple[str, ...] = tuple(header["splits"])
        self.channels: int = header["channels"]
        self.synthetic: bool = header["synthetic"]
        self.shards: list[dict[str, Any]] = header["shards"]
        self.starts = np.cumsum([0] + [shard["samples"] for shard in self.shards])  # [shards + 1]
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()

    @classmethod
    def open(cls, root: str | Path, cache: Cache | None = None) -> Index:
        """DataError when there is no index, when it is newer than this code, or when its files do not fit it.

        `cache`: where the files of an address go; None: as the environment says (cache.py).
        """
        remote = None
        if ADDRESS.fullmatch(str(root)):
            from shards.remote import Remote

            remote = Remote(str(root), cache)
            remote.small("index.json")
            remote.small("classes.csv", needed=False)
        root = remote.folder if remote else Path(root).absolute()
        file = root / "index.json"
        if not file.is_file():
            hint = "make one with `python -m shards build` or `python -m shards demo`"
            if any(root.glob("*.tar")):
                hint = f"index the tars that lie there (`python -m shards index {root}`)"
            raise DataError(f"{root} holds no index.json{'' if root.is_dir() else ' (no such folder)'}: {hint}")
        raw = file.read_bytes()
        index = cls(root, _header(raw, file), sha256(raw).hexdigest(), remote)
        if not remote:
            index._check_shards()
        names = {"source": len(index.sources), "label": len(index.classes), "split": len(index.splits)}
        if not fit(index._columns, len(index), names):
            raise DataError(f"{index}: index.json and index.safetensors do not belong together: index it again")
        return index

    def _check_shards(self) -> None:
        for shard in self.shards:
            path = self.root / shard["name"]
            if not path.is_file():
                raise DataError(f"shard {path} is missing: bring it back, or build or index the folder again")
            if path.stat().st_size != shard["bytes"]:
                raise DataError(
                    f"shard {path} has {path.stat().st_size:,} bytes where the index says {shard['bytes']:,}: "
                    "it was cut off or changed; copy it again, or index the folder again"
                )

    def __str__(self) -> str:
        return self.remote.url if self.remote else str(self.root)

    @property
    def name(self) -> str:
        """Of its folder, wherever that lies: for results, which name no machine."""
        return str(self).rpartition("/")[2]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def members(self) -> list[Index]:
        """An index is a mix of one (mix.py)."""
        return [self]

    @property
    def bounds(self) -> list[int]:
        """Where the samples of each member begin, and the end."""
        return [0, len(self)]

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k != "_columns"}
        return state | {"_maps": OrderedDict()}

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        name = "index.safetensors"
        try:
            with self._open(name, self.header["columns_sha256"]) as file:
                return map_columns(file)
        except OSError as error:
            raise DataError(f"{self}/{name} cannot be read ({error}): index the folder again") from None

    def column(self, name: str) -> np.ndarray:
        """One mapped column: `image json mask txt` [N, 2] (offset, size); `source split label group digest` [N]."""
        if name not in self._columns:
            raise DataError(f"the index of {self} has no column {name!r}; it has {', '.join(self._columns)}")
        return self._columns[name]

    def named(self) -> np.ndarray:
        """bool [S, K]: which of `classes` each of `sources` can name."""
        table = [[name in self.vocabulary.get(source, ()) for name in self.classes] for source in self.sources]
        return np.array(table, dtype=bool).reshape(len(self.sources), len(self.classes))

    def select(self, splits: Sequence[str] | None = ("train", "")) -> np.ndarray:
        """int64 numbers of the samples in these splits; None: all. DataError for an unknown split, or no sample."""
        if splits is None:
            return np.arange(len(self), dtype=np.int64)
        unknown = [name for name in splits if name not in self.splits]
        wanted = [self.splits.index(name) for name in splits if name in self.splits]
        chosen = np.flatnonzero(np.isin(self.column("split"), wanted)).astype(np.int64)
        if unknown or not len(chosen):
            counts = np.bincount(self.column("split"), minlength=len(self.splits))
            there = ", ".join(f"{n or '(none)'} {c:,}" for n, c in zip(self.splits, counts, strict=True) if c)
            asked = ", ".join(repr(name) for name in unknown or splits)
            raise DataError(f"{self} has no sample in split {asked}; it has {there or 'no sample at all'}")
        return chosen

    def key(self, i: int) -> str:
        at = self.column("key_at")
        return bytes(self.column("keys")[at[i] : at[i + 1]]).decode(errors="replace")

    def shard_of(self, i: int) -> tuple[str, int]:
        """The shard's file name, and the byte at which the image starts in it."""
        return self.shards[self._shard(i)]["name"], int(self.column("image")[i, 0])

    def read(self, i: int) -> Sample:
        """Everything about sample `i`. DataError when its bytes cannot be had."""
        parts = {name: self._bytes(i, name) for name in MEMBERS}
        row = self._row(i, parts["json"])
        try:
            text = None if parts["txt"] is None else parts["txt"].decode()
        except ValueError as error:
            raise DataError(f"sample {self.key(i)}: its txt member cannot be read ({error})") from None
        source = int(self.column("source")[i])
        return Sample(
            key=self.key(i),
            image=parts["image"] or b"",
            labels=self._labels(i, row),
            source="" if source < 0 else self.sources[source],
            group=cell(row.get("group"), f"sample {self.key(i)}: its group"),
            split=self.splits[int(self.column("split")[i])],
            meta=_meta(row),
            mask=parts["mask"],
            text=text,
        )

    def meta(self, i: int) -> dict[str, Any]:
        """The free columns of sample `i`, read without its image. DataError when they cannot be had."""
        return _meta(self._row(i, self._bytes(i, "json")))

    def labels(self, i: int) -> tuple[str, ...]:
        """All labels of sample `i`, read without its image. DataError when they cannot be had."""
        return self._labels(i, self._row(i, self._bytes(i, "json")))

    def _labels(self, i: int, row: dict[str, Any]) -> tuple[str, ...]:
        label = int(self.column("label")[i])  # a foreign tar has `cls` instead of a row
        found = labels_of(row, f"sample {self.key(i)}") or (() if label < 0 else (self.classes[label],))
        if strange := [name for name in found if name not in self._known]:
            raise DataError(f"sample {self.key(i)}: its label {strange[0]!r} is not in the index: index it again")
        return found

    def _row(self, i: int, data: bytes | None) -> dict[str, Any]:
        try:
            row = json.loads(data or b"{}")
        except (ValueError, RecursionError) as error:
            raise DataError(f"sample {self.key(i)}: its json member cannot be read ({error})") from None
        return row if isinstance(row, dict) else {}

    def verify(self) -> None:
        """Read every byte and compare the digests. DataError names the first file that differs."""
        expected = {shard["name"]: shard["sha256"] for shard in self.shards}
        expected["index.safetensors"] = self.header["columns_sha256"]
        for name, digest in expected.items():
            with self._open(name, digest) as file:
                if _sha256(file) != digest:
                    raise DataError(f"{self}/{name} is not what was indexed (its sha256 differs): copy it again")

    def ahead(self, shards: Sequence[int]) -> None:
        """Fetch these shards in the background, if they are not on this machine."""
        if self.remote:
            wanted = [self.shards[number] for number in shards]
            self.remote.ahead([(shard["name"], shard["sha256"], shard["bytes"]) for shard in wanted])

    def _shard(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def _bytes(self, i: int, member: str) -> bytes | None:
        offset, size = (int(v) for v in self.column(member)[i])
        if not offset:
            return None
        number = self._shard(i)
        data = self._map(number)
        if offset < 0 or size < 0 or offset + size > len(data):
            raise DataError(f"sample {self.key(i)}: its {member} lies outside shard {self.shards[number]['name']}")
        return data[offset : offset + size]

    def _map(self, number: int) -> mmap.mmap:
        if number in self._maps:
            self._maps.move_to_end(number)
            return self._maps[number]
        while len(self._maps) >= self._most_maps():
            self._unmap()
        shard = self.shards[number]
        try:
            with self._open(shard["name"], shard["sha256"], shard["bytes"]) as file:
                self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"shard {self}/{shard['name']} cannot be opened: {error}") from None
        return self._maps[number]

    def _open(self, name: str, digest: str, size: int | None = None) -> BinaryIO:
        return self.remote.open(name, digest, size, self._unmap) if self.remote else (self.root / name).open("rb")

    def _unmap(self) -> bool:
        """Let go of the shard that was used longest ago. False: there is none."""
        if self._maps:
            self._maps.popitem(last=False)[1].close()
            return True
        return False

    def _most_maps(self) -> int:
        if not self.remote:
            return OPEN_SHARDS
        largest = max(shard["bytes"] for shard in self.shards)  # what is mapped cannot make way in the cache
        return max(1, min(OPEN_SHARDS, self.remote.cache.size // 4 // max(largest, 1)))


def _meta(row: dict[str, Any]) -> dict[str, Any]:
    """Free columns: what lies under `meta`, or, in a foreign tar, whatever this format does not know."""
    known = ("label", "source", "group", "split", "meta")
    return row["meta"] if isinstance(row.get("meta"), dict) else {k: v for k, v in row.items() if k not in known}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return _sha256(file)


def _sha256(file: BinaryIO) -> str:
    digest = sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _header(raw: bytes, file: Path) -> dict[str, Any]:
    try:
        header = json.loads(raw)
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}")
        if header["version"] > VERSION:
            raise DataError(
                f"{file} has version {header['version']}, and this hybridssl reads up to {VERSION}: "
                "update hybridssl, or index the folder again with this one"
            )
        # The names become paths below the folder, so none may lead out of it.
        bad = [s["name"] for s in header["shards"] if not re.fullmatch(r"[^/\\\0]+\.tar", s["name"])]
        if bad:
            raise ValueError(f"{bad[0]!r} is no file name of a shard in this folder")
        if not all(type(s[key]) is int and s[key] >= 0 for s in header["shards"] for key in ("samples", "bytes")):
            raise ValueError("the sizes of a shard are no numbers")
        index = Index(file.parent, header, "")
        texts = [*index.sources, *index.splits, *index.vocabulary, *index.classes, header["columns_sha256"]]
        if not all(isinstance(text, str) for text in (*texts, *(shard["sha256"] for shard in index.shards))):
            raise ValueError("a name is no text")
        "".join(texts).encode()  # nor is half of a pair of surrogates
        if type(index.channels) is not int or not 1 <= index.channels <= MAX_CHANNELS:
            raise ValueError(f"images of {index.channels!r} channels are none: 1 to {MAX_CHANNELS} can be read")
        if "samples" not in header or set(index.sources) - set(index.vocabulary):
            raise ValueError("a field is missing, or is of another kind")
        return header
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{file} is no index of shards ({error}): index the folder again") from None
