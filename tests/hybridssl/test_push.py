"""An export on its way to the hub, against a stand-in on loopback: what arrives, what is sent again, what fails."""

from __future__ import annotations

import hashlib
import re
import shutil
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from hybridssl import push
from hybridssl.__main__ import main
from hybridssl.errors import UserError
from hybridssl.export import export
from tests.hybridssl.exports import make_run
from tests.hybridssl.standin import CUT, TOKEN, Fault, Hub, Repo, serving

REPO = "clinic/derm-s"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Steps 7 and 40 of a run, each in a folder; 7 has a model.onnx, whose content does not matter here."""
    root = tmp_path_factory.mktemp("exported")
    for step in (7, 40):
        folder = make_run(root / "run", step=step, registers=4)
        save_file({"digest": torch.arange(50)}, folder / "pretraining.safetensors")
        export(folder / f"checkpoints/step-{step}", root / f"step-{step}")
    (root / "step-7/model.onnx").write_bytes(b"onnx" * 1000)
    return root


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported / "step-7", tmp_path / "derm-s"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving() as hub, socket.socket() as hub.mute:
        hub.mute.bind(("127.0.0.1", 0))  # where nobody answers, nor can begin to listen while it is held
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in speaks LFS, Xet's elder
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's pauses between its tries
        yield hub


def send(folder: Path, *more: str) -> int:
    return main(["export", str(folder), "--push", REPO, *more])


def sent(hub: Hub, what: str = "(PUT|commit|/tag)") -> list[str]:
    """Requests that change something, since the last call."""
    found = [request for request in hub.seen if re.search(what, request) and "batch" not in request]
    hub.seen.clear()
    return found


def as_sent(folder: Path) -> dict[str, bytes]:
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name in push.FILES}
    return files | {"README.md": files["README.md"].replace(b"ORG/NAME", REPO.encode())}


def stored(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    return {name: data for name, data in hub.repos[REPO].at(revision)[1].items() if name in push.FILES}


def test_the_hub_holds_the_folder_and_timm_loads_it_from_there_and_from_disk(hub, folder, tmp_path, capsys):
    (folder / "patients.csv").write_text("somebody")
    assert send(folder) == 0
    assert stored(hub) == as_sent(folder) == stored(hub, "step-7")
    assert not hub.repos[REPO].private
    assert "hf-hub:clinic/derm-s" in stored(hub)["README.md"].decode()
    assert b"ORG/NAME" in (folder / "README.md").read_bytes()  # the folder can go to another repository as well
    printed = capsys.readouterr().out
    assert "not sent, as no part of an export: patients.csv" in printed
    assert "patients.csv" not in hub.repos[REPO].at("main")[1]
    assert printed.index("model.safetensors") < printed.index("tree/step-7: sent, public")

    down = tmp_path / "down"
    down.mkdir()
    for name, data in stored(hub, "step-7").items():
        (down / name).write_bytes(data)
    images = torch.randn(2, 3, 32, 32)
    ours = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
    for spec in (f"hf-hub:{REPO}@step-7", f"local-dir:{down}"):
        model = timm.create_model(spec, pretrained=True, num_classes=0).eval()
        torch.testing.assert_close(model(images), ours)


def test_the_same_step_again_sends_nothing(hub, folder, capsys):
    assert send(folder) == 0
    assert sent(hub)
    assert send(folder) == 0
    assert not sent(hub)
    assert "the same files are there already" in capsys.readouterr().out
    assert len(hub.repos[REPO].commits) == 2  # the first is the hub's own


def test_another_step_is_another_commit_and_tag_and_takes_stale_parts_away(hub, exported):
    assert send(exported / "step-7") == 0
    hub.repos[REPO].commits[-1]["figure.png"] = b"of the owner"
    assert send(exported / "step-40") == 0
    repo = hub.repos[REPO]
    assert repo.tags == {"step-7": 1, "step-40": 2}
    assert stored(hub, "step-7") == as_sent(exported / "step-7")
    assert stored(hub) == as_sent(exported / "step-40")  # without the model.onnx of step 7
    assert repo.at("main")[1]["figure.png"] == b"of the owner"
    assert stored(hub)["model.safetensors"] != stored(hub, "step-7")["model.safetensors"]


def test_a_changed_card_of_the_same_step_replaces_it_only_when_asked(hub, folder, capsys):
    assert send(folder) == 0
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nA word more.\n")
    sent(hub)
    assert send(folder) == 2
    assert not sent(hub)
    message = capsys.readouterr().err
    assert "has a tag step-7 with another README.md, so nothing was sent" in message
    assert "--retag" in message
    assert send(folder, "--revision", "step-7b") == 0
    assert b"A word more." not in stored(hub, "step-7")["README.md"]
    assert send(folder, "--retag") == 0
    assert hub.repos[REPO].tags["step-7"] == hub.repos[REPO].tags["step-7b"] == 2
    assert len([request for request in hub.seen if request.startswith("PUT")]) == 0  # no weights a second time


def test_a_cut_connection_leaves_nothing_half_and_the_next_call_sends_the_rest(hub, folder, capsys):
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    hub.faults = [Fault(f"PUT /store/{weights}", CUT, times=6)]  # as often as the client tries
    assert send(folder) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "the upload to clinic/derm-s broke" in printed
    assert f"`python -m hybridssl export {folder} --push {REPO}` goes on" in printed
    assert stored(hub) == {}  # not a file of it is to be seen
    assert not hub.repos[REPO].tags
    arrived = set(hub.store)
    assert len(arrived) == 2  # the digests and the ONNX file
    sent(hub)
    assert send(folder) == 0
    assert [request for request in sent(hub) if request.startswith("PUT")] == [f"PUT /store/{weights}"]
    assert stored(hub, "step-7") == as_sent(folder)


def test_a_cut_that_mends_and_a_failure_that_passes_are_not_noticed(hub, folder, capsys):
    hub.faults = [Fault("PUT /store", CUT), Fault("PUT /store", 500), Fault("preupload", 503), Fault("batch", 502)]
    assert send(folder) == 0
    assert not any(fault.times for fault in hub.faults)
    assert stored(hub, "step-7") == as_sent(folder)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("broken", ["commit", "/tag", "refs"])
def test_whatever_request_fails_the_next_call_mends_it(hub, folder, capsys, broken):
    hub.faults = [Fault(f"/api/models/{REPO}.*{broken}", 500)]
    assert send(folder) == 2
    assert "the hub failed with 500 (a fault of the test)" in capsys.readouterr().err
    assert send(folder) == 0
    assert stored(hub, "step-7") == as_sent(folder)
    assert len(hub.repos[REPO].commits) == 2
    assert len([request for request in hub.seen if request.startswith("PUT")]) == 3  # each large file once


def wrong_token(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_wrong")


def forbidden(hub, monkeypatch):
    hub.faults = [Fault("POST /api/repos/create", 403, 9, f"not for {TOKEN}"), Fault("GET /api/models", 403, 9)]


def no_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.mute.getsockname()[1]}")


def offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def no_token(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)


def refused(hub, monkeypatch):
    hub.faults = [Fault("commit", 400, 1, "no more room")]


@pytest.mark.parametrize(
    ("mishap", "message"),
    [
        (wrong_token, "the hub does not accept the token (401): `hf auth login`"),
        (forbidden, "the token may not write to clinic/derm-s (403: not for ***)"),
        (no_network, "the upload to clinic/derm-s broke (Connect"),
        (offline, "HF_HUB_OFFLINE is set"),
        (no_token, "no token of the hub: `hf auth login`"),
        (refused, "the hub refuses the upload to clinic/derm-s (400: "),
    ],
)
def test_a_mishap_is_one_line_and_never_tells_the_token(hub, folder, monkeypatch, capfd, caplog, mishap, message):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    mishap(hub, monkeypatch)
    assert send(folder) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    for told in (printed.out, printed.err, caplog.text):
        assert TOKEN not in told
        assert "hf_wrong" not in told
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not any(repo.tags for repo in hub.repos.values())


def test_a_mirror_without_xet_is_told_how(hub, folder, monkeypatch, capsys):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert send(folder) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "HF_HUB_DISABLE_XET=1 is for a mirror that knows no Xet" in printed
    assert stored(hub) == {}


def test_private_means_private(hub, folder, capsys):
    assert send(folder, "--private") == 0
    assert hub.repos[REPO].private
    assert "sent, private" in capsys.readouterr().out
    hub.repos[REPO] = Repo(private=False)
    sent(hub)
    assert send(folder, "--private") == 2
    assert "exists and is public, so nothing was sent" in capsys.readouterr().err
    assert not sent(hub)


def test_nothing_is_contacted_before_push_is_said(exported, tmp_path, monkeypatch):
    def contact(*args):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", contact)
    monkeypatch.setattr(socket, "getaddrinfo", contact)
    assert main(["export", str(exported / "run"), "--out", str(tmp_path / "out"), "--license", "mit"]) == 0


def test_a_run_is_exported_and_pushed_in_one_line(hub, exported, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(exported / "run"), "--out", str(out), "--push", REPO, "--revision", "v1"]) == 0
    assert stored(hub, "v1") == as_sent(out)
    assert f'timm.create_model("hf-hub:{REPO}@v1"' in capsys.readouterr().out
    assert main(["export", str(exported / "run"), "--out", str(out), "--push", REPO]) == 2
    assert f"`python -m hybridssl export {out} --push {REPO}` sends it as it stands" in capsys.readouterr().err


@pytest.mark.parametrize("repo", ["derm", "a/b/c", "a b/c", ".a/b", "a/", "ä/b", "../b", "a/b\n"])
def test_a_name_that_no_repository_has_is_refused_before_any_work(repo, tmp_path, capsys):
    assert main(["export", "no-run", "--out", str(tmp_path / "o"), "--push", repo]) == 2
    assert "write ORG/NAME" in capsys.readouterr().err


@pytest.mark.parametrize("tag", ["main", "a b", "-x", "a/b"])
def test_a_tag_that_cannot_be_is_refused(folder, tag):
    with pytest.raises(UserError, match="a tag is made of"):
        push.plan(folder, REPO, tag)


def test_an_exported_folder_is_pushed_as_it_stands_or_not_at_all(folder, tmp_path, capsys):
    for arguments, message in (
        ([], "is an export already: --push ORG/NAME publishes it"),
        (["--push", REPO, "--license", "mit", "--onnx"], "--onnx, --license belong to a run"),
    ):
        assert main(["export", str(folder), *arguments]) == 2
        assert message in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"is not an exported folder: it has no model\.safetensors"):
        push.plan(folder, REPO)
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "pretraining.json").write_text("[]")
    with pytest.raises(UserError, match="tells no step"):
        push.plan(folder, REPO)
