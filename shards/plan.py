"""Which file goes into which shard: a function of the list of files alone, so that any part of a build knows it.

Files are ordered by a hash of their names, which mixes folders and classes, and dealt into shards by their sizes on
disk. So a shard does not depend on what is in its files, nor on any other shard: shards are what parts of a build,
and an interrupted build, share out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path

from shards.options import BuildOptions, rows_or_bytes
from shards.pack import name_digest
from shards.table import Row


@dataclass(frozen=True)
class Plan:
    shards: list[list[Row]]
    digest: str  # of files, table and options
    states: list[str]  # of each shard: also of the times at which its files were changed
    files: str  # of all shards, likewise: what a part saw of the files of the others

    def part(self, number: int, of: int) -> list[int]:
        """The shards of part `number`, counted from 1."""
        return list(range(number - 1, len(self.shards), of))


def plan(rows: list[Row], options: BuildOptions, drop: frozenset[str] = frozenset()) -> Plan:
    sized = [(row, *_stats(row)) for row in rows]
    sized.sort(key=lambda item: (name_digest(item[0].name), item[0].name))
    most, limit = rows_or_bytes(options.shard_size)
    start = options.digest() + repr(sorted(drop)).encode()
    whole, shards, states, room = blake2b(start, digest_size=16), [], [], 0
    for row, size, changed in sized:
        expected = _expected(size, options)
        if not shards or len(shards[-1]) >= most or room < expected:
            shards.append([])
            states.append(blake2b(start, digest_size=16))
            room = limit
        room -= expected
        shards[-1].append(row)
        said = [str(getattr(row, f.name)) for f in fields(row) if f.name not in ("image", "mask", "slices")]
        said += [path.name for path in row.slices]
        mask = (row.mask.name, *_stat(row.mask)) if row.mask else ()
        whole.update(repr((size, said, mask[:2])).encode())
        states[-1].update(repr((size, said, changed, mask)).encode())
    each = [state.hexdigest() for state in states]
    return Plan(shards, whole.hexdigest(), each, blake2b(repr(each).encode(), digest_size=16).hexdigest())


def _expected(size: int, options: BuildOptions) -> int:
    """Bytes of a file's samples, roughly: a shrunken photograph has half a byte for each pixel of its square."""
    return min(size, options.short_side**2 * options.channels // 6 + 2000) if options.short_side else size


def _stats(row: Row) -> tuple[int, list[int]]:
    """Bytes of all its files, and when each was changed."""
    found = [_stat(path) for path in row.slices or (row.image,)]
    return sum(size for size, _ in found), [changed for _, changed in found]


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    except OSError:  # it will be set aside when it is read
        return 0, 0
