"""Shards at an address: a real HTTP server that fails on demand, and the cache that keeps what it serves."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import http.server
import json
import multiprocessing
import pickle
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shards import remote
from shards.__main__ import main
from shards.cache import Cache, CacheFull, parse_size
from shards.errors import DataError, FetchError
from shards.index import Index
from shards.mix import open_sets
from shards.stream import Order, SampleDataset, StreamOptions


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    monkeypatch.setattr(remote, "FULL_WAIT", 0.3)


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder. `plan[name]`: what the next requests for a file meet, a status or cut, short, wrong, endless."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.plan: dict[str, list[str]] = {}
        self.asked: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server  # type: ignore[assignment]

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked[name] += 1
        plan = self.server.plan.get(name)
        trouble = plan.pop(0) if plan else ""
        if not trouble:
            return super().do_GET()
        if trouble.isdigit():
            return self.send_error(int(trouble))
        body = Path(self.translate_path(self.path)).read_bytes()
        if trouble == "wrong":
            body = body[:700] + bytes([body[700] ^ 1]) + body[701:]
        if trouble == "short":
            body = body[:-512]
        if trouble == "endless":
            body *= 2
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if trouble == "cut" else body)
        if trouble == "cut":
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(index: Index) -> Iterator[Server]:
    started = Server(index.root.parent)
    threading.Thread(target=started.serve_forever, args=(0.02,), daemon=True).start()
    yield started
    started.shutdown()
    started.server_close()


@pytest.fixture
def url(server: Server, index: Index) -> str:
    return f"{server.url}/{index.root.name}"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", "1GB")


def shards_in(cache: Cache, index: Index) -> list[str]:
    return [shard["name"] for shard in index.shards if cache.has(shard["sha256"])]


def test_an_address_reads_like_a_folder(url: str, index: Index, cache: Cache) -> None:
    there = Index.open(f"{url}/", cache)
    assert str(there) == url
    assert (there.sha256, len(there), there.classes) == (index.sha256, 60, index.classes)
    assert not shards_in(cache, there)
    assert [there.read(i) for i in range(60)] == [index.read(i) for i in range(60)]
    assert np.array_equal(there.column("digest"), index.column("digest"))
    there.verify()
    again = pickle.loads(pickle.dumps(there))
    assert again.read(7) == index.read(7)
    assert Index.open(Path(url), cache).sha256 == index.sha256  # a Path has lost a slash
    assert len(open_sets(url, cache)) == 60


def test_an_address_is_audited_like_a_folder(
    url: str, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRIDSSL_CACHE", str(tmp_path / "cache"))
    assert main(["audit", url, "--against", url, "--out", str(tmp_path / "there")]) == 0
    assert main(["audit", str(index.root), "--against", str(index.root), "--out", str(tmp_path / "here")]) == 0
    there, here = (json.loads((tmp_path / name / "audit.json").read_text()) for name in ("there", "here"))
    assert there == here
    assert there["index"]["name"] == index.root.name


def test_each_shard_is_fetched_once_and_kept(url: str, server: Server, cache: Cache) -> None:
    for _ in range(2):
        there = Index.open(url, cache)
        for i in range(60):
            there.read(i)
    fetched = {name: count for name, count in server.asked.items() if name.endswith(".tar")}
    assert len(fetched) == len(there.shards)
    assert set(fetched.values()) == {1}
    assert server.asked["index.safetensors"] == 1
    assert server.asked["index.json"] == 2  # asked anew, or a changed set would go unnoticed


@pytest.mark.parametrize("trouble", ["500", "cut", "short", "wrong", "endless"])
def test_failures_are_tried_again(trouble: str, url: str, server: Server, index: Index, cache: Cache) -> None:
    name = index.shards[0]["name"]
    server.plan = {name: [trouble] * 3, "index.safetensors": [trouble], "index.json": ["500", "cut"]}
    assert Index.open(url, cache).read(0) == index.read(0)
    assert server.asked[name] == 4
    assert not list(cache.folder.glob("*.*"))


@pytest.mark.parametrize(
    ("trouble", "words"), [("500", "500"), ("wrong", "sha256 is not that of the index"), ("short", "bytes where")]
)
def test_a_lasting_failure_names_the_address(
    trouble: str, words: str, url: str, server: Server, index: Index, cache: Cache
) -> None:
    name = index.shards[0]["name"]
    server.plan = {name: [trouble] * 99}
    there = Index.open(url, cache)
    dataset = SampleDataset(there, Order(there, np.arange(3), StreamOptions()), lambda *args: args)
    with pytest.raises(FetchError, match=rf"{url}/{name} could not be fetched in 8 tries.*{words}"):
        dataset[0]  # not the fault of a sample, so nothing is put into quarantine
    assert not shards_in(cache, there)
    assert not list(cache.folder.glob("*.*"))


def test_an_address_where_nothing_is(url: str, server: Server, cache: Cache) -> None:
    with pytest.raises(FetchError, match=rf"{url}x/index.json does not exist"):
        Index.open(f"{url}x", cache)
    server.plan = {"index.json": ["500"] * 99}
    with pytest.raises(FetchError, match=rf"{url}/index.json could not be fetched in 4 tries"):
        Index.open(url, cache)


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_what_a_host_refuses_to_list_is_not_there(
    status: str, url: str, server: Server, index: Index, cache: Cache
) -> None:
    """Without the right to list, a store answers 403 for what is absent: classes.csv need not be there."""
    server.plan = {"classes.csv": [status] * 99}
    assert Index.open(url, cache).sha256 == index.sha256
    server.plan = {"index.json": [status] * 99}
    server.asked.clear()
    says = "does not exist" if status == "404" else rf"access was refused \({status}\).*credentials"
    with pytest.raises(FetchError, match=rf"{url}/index\.json.*{says}"):
        Index.open(url, cache)
    assert server.asked["index.json"] == 1  # another try mends nothing


def test_a_gated_repository_is_refused_by_its_response() -> None:
    error = OSError("gated")
    error.response = SimpleNamespace(status_code=403)  # type: ignore[attr-defined]
    with pytest.raises(remote.NotThere, match=r"hf://x may not be read, .*access was refused \(403\)"):
        remote._raise_if_lasting(error, "hf://x", "gated")


def test_what_is_no_known_address_is_a_folder() -> None:
    for name in ("pipe:cat /etc/passwd", "ftp://host/x", "file:///tmp", "simplecache::http://host/x"):
        with pytest.raises(DataError, match=r"holds no index\.json"):
            Index.open(name)


def test_a_digest_cannot_lead_out_of_the_cache(url: str, index: Index, tmp_path: Path, cache: Cache) -> None:
    there = Index.open(url, cache)
    there.shards[0]["sha256"] = "../../evil"
    with pytest.raises(FetchError, match="gives no sha256"):
        there.read(0)


def small_cache(tmp_path: Path, index: Index, shards: float) -> Cache:
    """Room for the columns and so many shards."""
    columns = (index.root / "index.safetensors").stat().st_size
    return Cache(tmp_path / "small", str(int(columns + shards * max(shard["bytes"] for shard in index.shards))))


def total(cache: Cache) -> int:
    """Bytes of its files, each once, though a thread that fetches ahead may rename or delete one meanwhile."""
    sizes = {}
    for path in cache.folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                about = path.stat()
                sizes[about.st_ino] = about.st_size
    return sum(sizes.values())


def test_the_cache_stays_below_its_size_and_drops_what_is_old(url: str, index: Index, tmp_path: Path) -> None:
    cache = small_cache(tmp_path, index, 3.5)
    there = Index.open(url, cache)
    firsts = [int(start) for start in there.starts[:-1]]
    for i in [*firsts[:3], firsts[0], firsts[3]]:
        assert there.read(i) == index.read(i)
        assert total(cache) <= cache.size
        time.sleep(0.02)  # the clock of a file system, by which the oldest goes, may tick every 10 ms
    kept = shards_in(cache, there)
    names = [shard["name"] for shard in there.shards]
    assert names[1] not in kept
    assert {names[0], names[3]} <= set(kept)
    order = Order(there, np.arange(60), StreamOptions(window=2))
    dataset = SampleDataset(there, order, lambda sample, *_: sample.key)
    assert sorted(dataset[p][0] for p in range(60)) == sorted(index.key(i) for i in range(60))
    assert total(cache) <= cache.size


def test_a_shard_in_use_is_never_dropped(url: str, index: Index, tmp_path: Path) -> None:
    cache = small_cache(tmp_path, index, 2.5)
    there, other = Index.open(url, cache), Index.open(url, cache)
    firsts = [int(start) for start in there.starts[:-1]]
    held = there.shards[0]
    mine = there.remote.open(held["name"], held["sha256"], held["bytes"])  # type: ignore[union-attr]
    for i in firsts[1:]:
        assert other.read(i) == index.read(i)
    assert held["name"] in shards_in(cache, there)
    other._unmap()
    second = there.shards[1]
    also = there.remote.open(second["name"], second["sha256"], second["bytes"])  # type: ignore[union-attr]
    with pytest.raises(CacheFull, match=r"is full of shards in use.*data.cache_size"):
        other.read(firsts[2])
    mine.close()
    assert other.read(firsts[2]) == index.read(firsts[2])
    also.close()


def test_a_map_holds_the_lock(url: str, cache: Cache) -> None:
    there = Index.open(url, cache)
    there.read(0)
    with (cache.folder / there.shards[0]["sha256"]).open("r+b") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there._unmap()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_cache_too_small_for_a_shard(url: str, tmp_path: Path) -> None:
    with pytest.raises(CacheFull, match=r"one shard has|is full"):
        Index.open(url, Cache(tmp_path / "tiny", "1KB")).read(0)


def read_all(url: str, cache: Cache, seed: int) -> list[str]:
    there = Index.open(url, cache)
    order = Order(there, np.arange(60), StreamOptions(window=1), seed)
    return [there.read(order(p)[1]).key for p in range(60)]


def test_processes_share_a_cache(url: str, server: Server, index: Index, cache: Cache) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.starmap(read_all, [(url, cache, 0)] * 3)
    assert found[0] == found[1] == found[2]
    assert max(server.asked[shard["name"]] for shard in index.shards) == 1


def test_what_came_between_the_look_and_the_lock_is_not_fetched_again(tmp_path: Path) -> None:
    fetched, digest = [], "a" * 64

    def fetch(part: Path) -> None:
        fetched.append(part.write_bytes(b"shard"))

    class Late(Cache):
        def _held(self, sha256: str) -> Any:
            if fetched:
                return super()._held(sha256)
            Cache(self.folder, "1MB").open(sha256, 5, fetch).close()  # type: ignore[union-attr]
            return None

    with Late(tmp_path, "1MB").open(digest, 5, fetch) as file:  # type: ignore[union-attr]
        assert file.read() == b"shard"
    assert fetched == [5]
    assert not list(tmp_path.glob("*.*"))


def test_processes_share_a_cache_that_is_too_small_for_all(url: str, index: Index, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(remote, "FULL_WAIT", 30)
    cache = small_cache(tmp_path, index, 2.2)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.starmap(read_all, [(url, cache, seed) for seed in range(2)])
    assert all(sorted(keys) == sorted(index.key(i) for i in range(60)) for keys in found)
    assert total(cache) <= cache.size


def test_an_index_that_is_dropped_leaves_its_shards_at_once(url: str, cache: Cache) -> None:
    """Not at the next collection of garbage: the error of a file that is not there (classes.csv) makes a cycle."""
    gc.collect()
    gc.disable()
    try:
        there = Index.open(url, cache)
        there.read(0)
        path = cache.folder / there.shards[0]["sha256"]
        del there
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        gc.enable()


def test_a_process_that_died_blocks_nobody(url: str, index: Index, cache: Cache) -> None:
    cache.folder.mkdir(parents=True)
    for shard in index.shards[:2]:
        (cache.folder / f"{shard['sha256']}.{shard['bytes']}.part").touch()
        (cache.folder / f"{shard['sha256']}.{shard['bytes']}.new").write_bytes(b"half")
    assert Index.open(url, cache).read(0) == index.read(0)
    cache.size = small_cache(cache.folder, index, 1.5).size  # making room, what the dead one left goes first
    assert Index.open(url, cache).read(20) == index.read(20)
    assert not [path.name for path in cache.folder.glob("*.*")]


def test_the_next_shards_are_fetched_ahead(url: str, server: Server, cache: Cache) -> None:
    there = Index.open(url, cache)
    order = Order(there, np.arange(60), StreamOptions(window=2))
    dataset = SampleDataset(there, order, lambda sample, *_: sample.key)
    dataset[0]
    expected = {there.shards[number]["name"] for number in order.shards(0)}
    assert len(expected) == 4
    until = time.monotonic() + 20
    while set(shards_in(cache, there)) != expected and time.monotonic() < until:
        time.sleep(0.01)
    assert set(shards_in(cache, there)) == expected
    assert all(server.asked[name] == 1 for name in expected)


def test_a_changed_set_is_noticed(index: Index, tmp_path: Path, cache: Cache) -> None:
    shutil.copytree(index.root, tmp_path / "set")
    started = Server(tmp_path)
    threading.Thread(target=started.serve_forever, args=(0.02,), daemon=True).start()
    url = f"{started.url}/set"
    before = Index.open(url, cache).sha256
    header = json.loads((tmp_path / "set" / "index.json").read_text())
    (tmp_path / "set" / "index.json").write_text(json.dumps(header | {"synthetic": True}))
    assert Index.open(url, cache).sha256 != before
    started.shutdown()
    started.server_close()


def test_sizes() -> None:
    assert [parse_size(text) for text in ("50GB", "1.5 mb", "1000", "1e9")] == [50 * 10**9, 1_500_000, 1000, 10**9]
    for bad in ("many", "-1GB", "5XB", ""):
        with pytest.raises(FetchError, match="like 50GB"):
            parse_size(bad)


def test_the_environment_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYBRIDSSL_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("HYBRIDSSL_CACHE_SIZE", "3MB")
    assert (Cache().folder, Cache().size) == (tmp_path / "here", 3_000_000)
    assert Cache(tmp_path / "there", "1GB").size == 10**9
