"""Walk the tars of a folder once and write their index. Names are checked, members are never unpickled."""

from __future__ import annotations

import json
import os
import tarfile
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import save_file

from shards.cells import cell, labels_of
from shards.errors import DataError
from shards.format import CREATED_BY, FORMAT, IMAGE_EXTENSIONS, PICKLED, SPLITS, VERSION, hash64
from shards.index import MEMBERS, Index, file_sha256

Member = tuple[int, int]  # byte offset and size
Record = dict[str, Any]  # key, labels, source, split, group and digest (hashes), and a Member for each of MEMBERS


def write(
    root: str | Path,
    *,
    synthetic: bool = False,
    channels: int = 3,
    source: str = "",
    split: str = "",
    in_place: bool = False,
    progress: Callable[[str], None] = lambda shard: None,
) -> Index:
    """Index all `*.tar` of a folder and open the result.

    `source` and `split` stand in for samples that name none; `in_place` marks tars that `build` did not write, and must
    never delete. Raises DataError naming shard and member for what is unsafe or damaged. Nothing is left on an error.
    """
    root = Path(root)
    tars = sorted(path for path in root.glob("*.tar") if path.is_file())
    if not tars:
        packed = sorted(root.glob("*.tar.*")) + sorted(root.glob("*.tgz"))
        hint = f"; unpack {packed[0].name} first (byte offsets need a plain tar)" if packed else ""
        raise DataError(f"{root} holds no *.tar file to index{hint}")

    def scanned() -> Iterator[tuple[dict[str, Any], list[Record]]]:
        for path in tars:
            yield shard(path, source, split)
            progress(path.name)

    return write_index(root, scanned(), synthetic=synthetic, channels=channels, in_place=in_place)


def shard(path: Path, source: str = "", split: str = "") -> tuple[dict[str, Any], list[Record]]:
    """One tar: what the index says of the shard, and a plain record (it goes into JSON) of each of its samples."""
    found, alone = [], set()  # alone: keys of members without an image beside them
    with path.open("rb") as file:
        for key, members in samples(path):
            record = _record(file, key, members, source, split)
            if record is None:
                alone.add(key)
            else:
                found.append(record)
    if lost := next((record["key"] for record in found if record["key"] in alone), ""):
        raise DataError(
            f"{path}: the members of sample {lost!r} do not lie together, so its label would be lost: pack the files "
            "again in the order of their names (tar --sort=name)"
        )
    about = {"name": path.name, "samples": len(found), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return about, found


def write_index(
    root: Path,
    scanned: Iterable[tuple[dict[str, Any], list[Record]]],
    *,
    synthetic: bool = False,
    channels: int = 3,
    in_place: bool = False,
) -> Index:
    """Write the index of shards as `shard` describes them, and open it."""
    columns, shards = _Columns(), []
    for about, records in scanned:
        for record in records:
            columns.add(record)
        shards.append(about)
    if not len(columns):
        what = f"no sample with an image ({', '.join(IMAGE_EXTENSIONS)})"
        raise DataError(f"{what} in the {len(shards)} tars of {root}")
    if in_place:  # what `build` writes has keys that name one sample each
        columns.tell_apart(shards)
    new = root / "index.safetensors.new", root / "index.json.new"
    try:
        save_file(columns.finish(), new[0])
        header = {
            "format": FORMAT,
            "version": VERSION,
            "created_by": CREATED_BY,
            "synthetic": synthetic,
            "in_place": in_place,
            "channels": channels,
            "samples": len(columns),
            "shards": shards,
            "sources": columns.sources,
            "vocabulary": {name: sorted(columns.vocabulary[name]) for name in columns.sources},
            "splits": columns.splits,
            "columns_sha256": file_sha256(new[0]),
        }
        new[1].write_text(json.dumps(header, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        new[0].chmod(new[1].stat().st_mode)  # safetensors writes for the owner alone
        os.replace(new[0], root / "index.safetensors")
        os.replace(new[1], root / "index.json")
    finally:
        for path in new:
            path.unlink(missing_ok=True)
    return Index.open(root)


def samples(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, {extension: (offset, size)}) of each sample in a tar, keys as WebDataset makes them."""
    current, members, end = None, {}, 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="strict") as tar:
            for info in tar:
                _check_extent(path, info)
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if info.isdir():
                    _check_name(path, info.name)
                    continue
                key, extension = _member(path, info)
                if key != current:
                    if current is not None:
                        yield current, members
                    current, members = key, {}
                if extension in members:
                    raise DataError(f"{path}: member {info.name!r} is there twice")
                members[extension] = info.offset_data, info.size
                tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every member it has seen
        _check_end(path, end)
    except (tarfile.TarError, EOFError, ValueError) as error:  # ValueError: numbers and names that are none
        raise DataError(f"{path} is no readable plain tar, or is cut off ({error}): copy it again") from None
    if current is not None:
        yield current, members


def _check_extent(path: Path, info: tarfile.TarInfo) -> None:
    end, whole = info.offset_data + info.size, path.stat().st_size
    if not 0 <= info.offset_data <= end <= whole:
        raise DataError(
            f"{path}: member {info.name!r} reaches byte {end:,} of {whole:,}: damaged or cut off, copy the tar again"
        )


def _check_end(path: Path, end: int) -> None:
    """tarfile takes a damaged header for the end of the tar, so look: a tar ends in blocks of zeros."""
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{path} is damaged or cut off at byte {end:,} of {path.stat().st_size:,}: copy it again")


def _member(path: Path, info: tarfile.TarInfo) -> tuple[str, str]:
    _check_name(path, info.name)
    if not info.isreg() or info.issparse():
        raise DataError(f"{path}: member {info.name!r} is a link or a special file, which is refused")
    folder, _, name = info.name.rpartition("/")
    stem, _, extension = name.partition(".")
    extension = extension.lower()
    if extension.rpartition(".")[2] in PICKLED:
        raise DataError(f"{path}: member {info.name!r} is pickled, which can run code when read: remove it")
    return f"{folder}/{stem}" if folder else stem, extension


def _check_name(path: Path, name: str) -> None:
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise DataError(f"{path}: member {name!r} leaves its folder, which is refused")
    if any(unicodedata.category(sign) in ("Cc", "Cf", "Cs") for sign in name):
        raise DataError(f"{path}: member {name!r} has signs in its name that cannot be seen, which is refused")


def _record(file: BinaryIO, key: str, members: dict[str, Member], source: str, split: str) -> Record | None:
    """What the index holds of a sample; None: it has no image."""
    image = next((members[e] for e in IMAGE_EXTENSIONS if e in members), None)
    if image is None:
        return None
    row = _json(file, key, members)
    where = f"{file.name}: sample {key!r}"
    labels = labels_of(row, where)
    if not labels and "cls" in members:
        labels = (_read(file, members["cls"]).decode("utf-8", "replace").strip(),)
    labels = tuple(label for label in labels if label)
    said = {name: cell(row.get(name), f"{where}: its {name}") for name in ("source", "split", "group")}
    found = {"image": image, "json": members.get("json"), "mask": members.get("mask.png"), "txt": members.get("txt")}
    return {
        "key": key,
        "labels": labels,
        "source": said["source"] or source or ("default" if labels else ""),
        "split": said["split"] or split,
        "group": hash64(said["group"].encode()) if said["group"] else 0,
        "digest": hash64(_read(file, image)),
        **{name: member or (0, 0) for name, member in found.items()},
    }


def _json(file: BinaryIO, key: str, members: dict[str, Member]) -> dict[str, Any]:
    if "json" not in members:
        return {}
    try:
        data = _read(file, members["json"])
        row = json.loads(data)
        if b"\\u" in data:  # half of a pair of surrogates is no text that could be written again
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.name}: the json member of sample {key!r} is no JSON ({error})") from None
    return row if isinstance(row, dict) else {}


class _Columns:
    """The rows of an index as they are found; names become numbers at the end."""

    def __init__(self) -> None:
        self.members = {name: array("q") for name in MEMBERS}
        self.numbers = {name: array("q") for name in ("source", "split", "label", "group", "digest")}
        self.keys, self.key_at = bytearray(), array("q", [0])
        self.sources: list[str] = []
        self.splits: list[str] = list(SPLITS)
        self.labels: dict[str, int] = {}  # first label -> number, in the order met
        self.vocabulary: dict[str, set[str]] = {}

    def __len__(self) -> int:
        return len(self.key_at) - 1

    def add(self, record: Record) -> None:
        for name in MEMBERS:
            self.members[name].extend(record[name])
        source, labels = record["source"], record["labels"]
        numbers = {
            "source": self._number(self.sources, source) if source else -1,
            "split": self._number(self.splits, record["split"]),
            "label": self.labels.setdefault(labels[0], len(self.labels)) if labels else -1,
            "group": record["group"],
            "digest": record["digest"],
        }
        for name, value in numbers.items():
            self.numbers[name].append(value)
        if source:
            self.vocabulary.setdefault(source, set()).update(labels)
        self.keys += record["key"].encode()
        self.key_at.append(len(self.keys))

    def tell_apart(self, shards: list[dict[str, Any]]) -> None:
        """Where shards number their samples alike, say the shard in every key: an audit, a gallery and a table for the
        annotators name samples by it."""
        keys = [bytes(self.keys[start:end]) for start, end in zip(self.key_at, self.key_at[1:], strict=False)]
        if len(set(keys)) == len(keys):
            return
        stems = [Path(about["name"]).stem for about in shards for _ in range(about["samples"])]
        self.keys, self.key_at = bytearray(), array("q", [0])
        for stem, key in zip(stems, keys, strict=True):
            self.keys += stem.encode() + b"/" + key
            self.key_at.append(len(self.keys))

    @staticmethod
    def _number(names: list[str], name: str) -> int:
        if name not in names:
            names.append(name)
        return names.index(name)

    def finish(self) -> dict[str, np.ndarray]:
        if len(self.splits) > 127:
            raise DataError(f"{len(self.splits)} splits, such as {self.splits[-1]!r}: is that column a split?")
        sources = sorted(self.sources)
        by_source = np.array([sources.index(name) for name in self.sources] + [-1])  # [-1] maps "none" to itself
        every = sorted({label for names in self.vocabulary.values() for label in names})
        by_label = np.array([every.index(name) for name in self.labels] + [-1])
        self.sources = sources
        dtypes = {"source": np.int32, "split": np.int8, "label": np.int32, "group": np.int64, "digest": np.int64}
        out = {name: np.array(self.numbers[name], dtype) for name, dtype in dtypes.items()}
        out["source"] = by_source[out["source"]].astype(np.int32)
        out["label"] = by_label[out["label"]].astype(np.int32)
        out |= {name: np.array(values, np.int64).reshape(-1, 2) for name, values in self.members.items()}
        out["keys"], out["key_at"] = np.frombuffer(bytes(self.keys), np.uint8), np.array(self.key_at, np.int64)
        return out


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member[0])
    return file.read(member[1])
