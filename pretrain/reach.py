"""Which images a look at a set may read: all that lie on this machine; of an address, those of a few shards.

To read one image of an address its whole shard is fetched: images spread evenly over the set would fetch all of it.
"""

from __future__ import annotations

import numpy as np

from shards.index import Index

BYTES = 4 * 10**9  # fetched for one look: some minutes on a line of a hospital, and 16 shards of the usual size
SHARDS = 100  # so many small ones: each is a request
PART = 8  # one look takes a PARTth of the cache: those of a probe, at two splits of two sets, leave half to the stream


def within_reach(index: Index, numbers: np.ndarray, of_the_cache: bool = True) -> np.ndarray:
    """Those of `numbers` (ascending) that lie in a folder, or in a few shards, evenly spread, of an address.

    of_the_cache: no more than a part of it. Without, they follow from the index alone, wherever they are asked for.
    """
    far = sum(member.remote is not None for member in index.members)
    if not far:
        return numbers
    kept = []
    for member, first, end in zip(index.members, index.bounds, index.bounds[1:], strict=False):
        own = numbers[(first <= numbers) & (numbers < end)]
        if member.remote:
            room = min(BYTES, member.remote.cache.size // PART) if of_the_cache else BYTES
            own = own[_in_few_shards(member, own - first, room // far)]
        kept.append(own)
    return np.concatenate(kept)


def _in_few_shards(index: Index, numbers: np.ndarray, room: int) -> np.ndarray:
    """bool [N]: which lie in the chosen shards, as many as `room` bytes hold, and one at least."""
    shard = np.searchsorted(index.starts, numbers, side="right") - 1
    there = chosen = np.unique(shard)
    for count in range(min(len(there), SHARDS), 0, -1):
        chosen = there[((np.arange(count) + 0.5) * len(there) / count).astype(int)]
        if sum(index.shards[number]["bytes"] for number in chosen) <= room:
            break
    return np.isin(shard, chosen)
