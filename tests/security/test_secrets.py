"""Passwords, signatures and tokens are used and never told: not in a log, a recipe, a checkpoint, a card or a page."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from finetune import study
from finetune.__main__ import main as finetune
from hybridssl.__main__ import main as hybridssl
from hybridssl.recipe import to_yaml
from pretrain.command import load
from pretrain.loop import main as pretrain
from shards import demo, remote
from shards.address import below, hushed, public, told, whole
from shards.cache import Cache
from shards.errors import FetchError
from shards.index import Index
from tests.pretrain.conftest import TINY

USER, PASSWORD, SIGNATURE = "anna-the-reader", "pa55w0rd-of-anna", "c2lnbmF0dXJl-of-the-bucket"
OTHER = "another-signature-of-today"
PLANTED = {
    "HF_TOKEN": "hf_plantedTokenOfTheHub",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEY",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+of/amazon",
    "WANDB_API_KEY": "planted-key-of-a-tracker",
}
SECRETS = [*(form for s in (USER, PASSWORD, SIGNATURE, OTHER, *PLANTED.values()) for form in (s, quote(s, safe="")))]
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


class Guarded(http.server.SimpleHTTPRequestHandler):
    """Serves a folder to whoever brings both the password and a signature."""

    trouble: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        if self.is_allowed():
            super().do_GET()

    def do_HEAD(self) -> None:
        if self.is_allowed():
            super().do_HEAD()

    def is_allowed(self) -> bool:
        split = urlsplit(self.path)
        if parse_qs(split.query).get("sig", [""])[0] not in (SIGNATURE, OTHER):
            self.send_error(403, f"no signature in {self.path}")
        elif self.headers.get("Authorization") != f"Basic {BASIC}":
            self.send_error(401, "no password")
        elif self.trouble:
            self.send_error(self.trouble[0], f"trouble with {self.path}")
        else:
            self.path = split.path
            return True
        return False

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "demo"
    demo.generate(folder, samples=120, seed=0, size=48)
    return folder


@pytest.fixture
def host(data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    monkeypatch.setattr(Guarded, "trouble", [])
    handler = functools.partial(Guarded, directory=str(data.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def signed(host: str, signature: str = SIGNATURE) -> str:
    return f"http://{USER}:{PASSWORD}@{host}/demo?sv=2026&sig={signature}"


def assert_silent(text: str, where: str) -> None:
    told = [secret for secret in SECRETS if secret in text]
    assert not told, f"{where} tells {told}"


def assert_files_silent(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert_silent(path.read_bytes().decode("latin-1"), str(path.relative_to(folder)))
        assert_silent(str(path), "a name")


@pytest.mark.timeout(900)  # two trainings, a probe and their pages
def test_a_run_from_its_data_to_its_report(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, caplog
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HYBRIDSSL_CACHE", str(tmp_path / "cache"))
    run, model = tmp_path / "run", tmp_path / "model"
    keys = [*TINY, f"out={run}", "data.workers=1", "probe.every=2", "steps=2"]
    assert pretrain([*keys, f"data.train={signed(host)}", "log.trackers=[tensorboard]"]) == 0
    recorded = f"http://{host}/demo"
    assert f"train: {recorded}" in (run / "recipe.yaml").read_text()
    page = (run / "report.html").read_text()
    assert "Nearest neighbours" in page  # the report had the images: it was given the whole address
    # The signature of tomorrow is another, and the run the same.
    assert pretrain([*keys, f"data.train={signed(host, OTHER)}", "steps=2"]) == 0
    state = json.loads((run / "checkpoints" / "step-2" / "state.json").read_text())
    assert state["data"]["index"] == recorded
    assert hybridssl(["export", str(run), "--out", str(model)]) == 0
    probe = ["--backbone", str(model), "--data", signed(host), "--out", str(tmp_path / "results")]
    assert finetune(["probe", *probe, "--methods", "logistic"]) == 0
    assert finetune(["report", str(tmp_path / "results"), "--out", str(tmp_path / "results.html")]) == 0
    assert hybridssl(["doctor", "--data", signed(host), "--out", str(tmp_path / "proposed.yaml"), *TINY[1:]]) == 0
    assert recorded in (tmp_path / "proposed.yaml").read_text()
    assert_files_silent(tmp_path)
    output = capfd.readouterr()
    assert_silent(output.out + output.err, "the terminal")
    # What libraries log of their own only whoever asks for DEBUG will see: fsspec tells the address there.
    assert_silent("\n".join(r.getMessage() for r in caplog.records if r.levelno > logging.DEBUG), "a log")


@pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
def test_errors(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, status: int) -> None:
    monkeypatch.setenv("HYBRIDSSL_CACHE", str(tmp_path / "cache"))
    Guarded.trouble.append(status)
    with pytest.raises(FetchError, match=rf"http://{host}/demo/index\.json") as caught:
        Index.open(signed(host))
    assert_silent(str(caught.value) + repr(caught.value.__cause__), "an error")
    assert pretrain([*TINY, f"out={tmp_path / 'run'}", f"data.train={signed(host)}"]) == 2
    assert_silent(capsys.readouterr().err, "the terminal")


@pytest.mark.parametrize(
    "address", ["http://{host}/demo?sig=wrong-signature", "http://u:wrong-password@{host}/demo?sig=x"]
)
def test_what_was_wrong_is_not_told_either(host: str, tmp_path: Path, address: str) -> None:
    with pytest.raises(FetchError) as caught:
        Index.open(address.format(host=host), Cache(tmp_path, "1GB"))
    assert "wrong-" not in str(caught.value)


def test_a_mix_and_its_probe_are_recorded_without_credentials(tmp_path: Path) -> None:
    sets = f"data/a, {signed('one.example')},https://two.example/b?token={SIGNATURE}"
    recipe = load(["recipe=demo", f"data.train={sets}", f"data.probe={signed('three.example')}", "out=o"])
    text = to_yaml(recipe)
    assert_silent(text, "recipe.yaml")
    assert "http://one.example/demo" in text
    assert "https://two.example/b" in text
    assert recipe.data.sets[1] == signed("one.example")  # what the run itself uses is whole
    listed = load(["recipe=demo", f"data.train=['{signed('one.example')}', b]", "out=o"])
    assert_silent(to_yaml(listed), "recipe.yaml")
    kept = load(["recipe=demo", "data.train=a", f"probe.keep={signed('four.example')}", "out=o"])
    assert_silent(to_yaml(kept), "recipe.yaml")


def test_a_study_tells_no_credentials(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = ["derm-suite", f"data={signed('one.example')}", "backbones=histogram,timm:x", "--out", str(tmp_path / "o")]
    assert finetune(["study", *args, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "http://one.example/demo" in said
    assert_silent(said, "the terminal")
    assert study.told(f"--data {signed('h')} x") == "--data http://h/demo x"


@pytest.mark.parametrize(
    ("address", "shown", "member"),
    [
        ("https://u:p@host:1/a/b/?sig=x/y&se=1", "https://host:1/a/b/", "https://u:p@host:1/a/b/i.json?sig=x/y&se=1"),
        ("https:/u:p@host/a?sig=x", "https://host/a", "https://u:p@host/a/i.json?sig=x"),
        ("https://host/a@b/c", "https://host/a@b/c", "https://host/a@b/c/i.json"),
        ("https://host/a#secret", "https://host/a", None),
        ("s3://key:secret@bucket/a", "s3://bucket/a", "s3://key:secret@bucket/a/i.json"),
        ("s3://bucket/a", "s3://bucket/a", "s3://bucket/a/i.json"),
        ("hf://datasets/org/a@main", "hf://datasets/org/a@main", "hf://datasets/org/a@main/i.json"),
        ("data/a?b", "data/a?b", None),
        ("/data/u:p@h", "/data/u:p@h", None),
    ],
)
def test_addresses(address: str, shown: str, member: str | None) -> None:
    assert public(address) == shown
    if member:
        assert below(whole(address), "i.json") == member


def test_what_a_driver_says_is_hushed() -> None:
    address = f"https://{USER}:{PASSWORD}@host/a?sig={quote('a/b+c=d')}"
    said = f"GET {address} failed; {quote(PASSWORD)} and a/b+c=d are wrong, says {USER}"
    assert hushed(said, address) == "GET https://host/a failed; *** and *** are wrong, says ***"
    assert told(f"data.train=https://a:b@h/x?y=z,{address}") == "data.train=https://h/x,https://host/a"
