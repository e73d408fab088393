"""The other addresses: an S3 server that fails on demand, TLS, and what a hub's or Google's address becomes."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
import s3fs
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from shards import remote
from shards.cache import Cache
from shards.errors import FetchError
from shards.index import Index
from shards.stream import Order, SampleDataset, StreamOptions
from tests.shards.test_remote import Server

Trouble = dict[str, list[str]]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", "1GB")


class Failing:
    """S3 by moto, as a WSGI application. `plan[file name]`: what the next GETs of it meet."""

    def __init__(self) -> None:
        self.inner, self.plan, self.asked = DomainDispatcherApplication(create_backend_app), {}, Counter[str]()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        name, said = environ["PATH_INFO"].rpartition("/")[2], {}
        trouble = ""
        if environ["REQUEST_METHOD"] == "GET":
            self.asked[name] += 1
            plan = self.plan.get(name)
            trouble = plan.pop(0) if plan else ""
        if not trouble:
            return self.inner(environ, start)
        if trouble == "500":
            start("500 Internal Server Error", [("Content-Length", "0")])
            return []
        body = b"".join(self.inner(environ, lambda status, headers, *_: said.update(status=status, headers=headers)))
        whole = body
        if trouble == "wrong":
            body = whole = body[:700] + bytes([body[700] ^ 1]) + body[701:]
        if trouble == "short":
            body = whole = body[:-512]
        if trouble == "cut":
            body = body[: len(body) // 2]
        known = ("content-length", "x-amz-checksum")  # without the store's own checksums, which not every store has
        headers = [(k, v) for k, v in said["headers"] if not k.lower().startswith(known)]
        start(said["status"], [*headers, ("Content-Length", str(len(whole))), ("Connection", "close")])
        return [body]


@pytest.fixture
def s3(index: Index, monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    """The set in the bucket `clinic`, below sets/derm."""
    app = Failing()
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    for key, value in {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # the driver's own tries would hide whether ours work
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    s3fs.S3FileSystem.clear_instance_cache()  # one that knows the server of another test
    client = boto3.client("s3")
    client.create_bucket(Bucket="clinic")
    for path in index.root.iterdir():
        client.upload_file(str(path), "clinic", f"sets/derm/{path.name}")
    yield app
    server.shutdown()
    server.server_close()
    s3fs.S3FileSystem.clear_instance_cache()


URL = "s3://clinic/sets/derm"


def test_a_set_in_a_bucket(s3: Failing, index: Index, cache: Cache) -> None:
    there = Index.open(URL, cache)
    assert [there.read(i) for i in range(60)] == [index.read(i) for i in range(60)]
    there.verify()
    assert {s3.asked[shard["name"]] for shard in index.shards} == {1}
    with pytest.raises(FetchError, match=r"s3://clinic/nothing/index.json does not exist"):
        Index.open("s3://clinic/nothing", cache)


@pytest.mark.parametrize("trouble", ["500", "cut", "short", "wrong"])
def test_failures_of_a_bucket_are_tried_again(trouble: str, s3: Failing, index: Index, cache: Cache) -> None:
    name = index.shards[0]["name"]
    s3.plan = {name: [trouble] * 2, "index.safetensors": [trouble], "index.json": ["500", "cut"]}
    assert Index.open(URL, cache).read(0) == index.read(0)
    assert s3.plan == {name: [], "index.safetensors": [], "index.json": []}
    assert not list(cache.folder.glob("*.*"))


@pytest.mark.parametrize(
    ("trouble", "words"), [("500", "500|Internal"), ("wrong", "sha256 is not that of the index"), ("short", "bytes")]
)
def test_a_lasting_failure_of_a_bucket_stops_the_run(
    trouble: str, words: str, s3: Failing, index: Index, cache: Cache
) -> None:
    name = index.shards[0]["name"]
    there = Index.open(URL, cache)
    s3.plan = {name: [trouble] * 999}
    dataset = SampleDataset(there, Order(there, there.select()[:3], StreamOptions()), lambda *args: args)
    with pytest.raises(FetchError, match=rf"{URL}/{name} could not be fetched in 8 tries.*({words})"):
        dataset[0]
    assert not cache.has(index.shards[0]["sha256"])


def certificate(folder: Path) -> tuple[Path, Path]:
    """Of 127.0.0.1, signed by itself, as a hospital's own authority would."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.timezone.utc)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    kinds = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *kinds))
    return folder / "cert.pem", folder / "key.pem"


READ = """
import hashlib, sys
from shards import remote
from shards.index import Index
remote.PAUSE, remote.FIRST_TRIES = 0.01, 3
there = Index.open(sys.argv[1])
print(hashlib.sha256(b"".join(there.read(i).image for i in range(len(there)))).hexdigest())
"""


def test_https_is_read_through_failures_and_only_with_a_known_certificate(index: Index, tmp_path: Path) -> None:
    """A process of its own, for the certificates that are trusted are read once."""
    cert, key = certificate(tmp_path)
    server = Server(index.root.parent)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a refused handshake is what is tested
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    name = index.shards[1]["name"]
    server.plan = {name: ["500", "cut", "short", "wrong"], "index.json": ["cut"]}
    url = f"https://127.0.0.1:{server.server_address[1]}/{index.root.name}"

    def read(trusted: Path | None) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "HYBRIDSSL_CACHE": str(tmp_path / "cache")}
        env |= {"SSL_CERT_FILE": str(trusted)} if trusted else {}
        return subprocess.run([sys.executable, "-c", READ, url], env=env, capture_output=True, text=True)

    refused, done = read(None), read(cert)
    server.shutdown()
    server.server_close()
    assert "could not be fetched in 3 tries" in refused.stderr
    assert "certificate" in refused.stderr
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest(index)]
    assert server.asked[name] == 5


def digest(index: Index) -> str:
    from hashlib import sha256

    return sha256(b"".join(index.read(i).image for i in range(len(index)))).hexdigest()


@pytest.mark.parametrize("protocol", ["hf", "gs"])
def test_an_address_goes_to_its_driver_as_it_is(
    protocol: str, index: Index, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in driver, whose files lie in a folder: no hub is asked in a test."""
    asked: list[str] = []

    class Driver(DirFileSystem):
        def __init__(self, **options: Any) -> None:
            assert not options
            super().__init__(path=str(index.root.parent), fs=LocalFileSystem())

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            asked.append(path)
            return path.removeprefix(f"{protocol}://datasets/clinic/")

    monkeypatch.setitem(_registry, protocol, Driver)
    url = f"{protocol}://datasets/clinic/{index.root.name}"
    there = Index.open(Path(url), cache)  # a Path has lost a slash
    assert str(there) == url
    assert [there.read(i) for i in range(60)] == [index.read(i) for i in range(60)]
    assert f"{url}/index.json" in asked
    assert f"{url}/{index.shards[0]['name']}" in asked


def test_the_driver_of_a_hub_is_the_hubs_own() -> None:
    assert fsspec.get_filesystem_class("hf").__module__.startswith("huggingface_hub")


def test_a_missing_driver_is_named(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    _registry.pop("gs", None)
    with pytest.raises(FetchError, match=r"gs://clinic/index.json needs another package.*gcsfs.*hybridssl\[gs\]"):
        Index.open("gs://clinic", cache)
