"""An exported folder -> a model repository on the hub: one commit and one tag a step, nothing that is there sent again.

`plan` looks at the folder and contacts nobody; `upload` does what the plan says. A broken upload leaves the repository
as it was: files go to its store first, and the commit that makes them visible comes last. The next call asks the hub
what it holds already (huggingface_hub compares digests of files, or of their chunks) and sends the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridssl.card_code import HERE
from hybridssl.errors import UserError
from hybridssl.files import sha256
from hybridssl.quiet import quiet

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# The parts of an export. Nothing else in the folder goes up, and nothing else in the repository is touched.
FILES = ("README.md", "config.json", "model.safetensors", "model.onnx", "pretraining.json", "pretraining.safetensors")
NEEDED = ("README.md", "config.json", "model.safetensors", "pretraining.json")
LOGIN = (
    "`hf auth login` stores a token of https://huggingface.co/settings/tokens with the right to write, or set HF_TOKEN"
)


@dataclass(frozen=True)
class Plan:
    """What would go where. files: name -> where it is read, or its text with the repository's name filled in."""

    folder: Path
    repo: str
    tag: str
    private: bool
    files: Mapping[str, Path | bytes]
    left_out: tuple[str, ...]  # what else is in the folder

    def lines(self) -> list[str]:
        """A summary to read before anything is sent."""
        sizes = {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in self.files.items()}
        return [
            f"to the model repository {self.repo}{' (private)' if self.private else ''}, tag {self.tag}:",
            *(f"  {name:<{max(map(len, sizes))}}  {math.ceil(size / 1000):>10,} kB" for name, size in sizes.items()),
            *([f"  not sent, as no part of an export: {', '.join(self.left_out)}"] if self.left_out else []),
        ]


@dataclass(frozen=True)
class Outcome:
    url: str
    new: bool  # False: the tag held these very files
    private: bool


def check_names(repo: str, tag: str = "") -> None:
    """UserError for a repository or a tag that the hub cannot have."""
    part = r"[A-Za-z0-9][\w.-]*"
    if not re.fullmatch(f"{part}/{part}", repo, re.ASCII):
        raise UserError(
            f"--push {repo!r}: write ORG/NAME, an organisation or user of the hub and a name of letters, digits, - _ ."
        )
    if tag and (tag == "main" or not re.fullmatch(part, tag, re.ASCII)):
        raise UserError(f"--revision {tag!r}: a tag is made of letters, digits, - _ . and is not main")


def require_token() -> str:
    """The user's token of the hub. UserError without one."""
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception as error:  # it was to come from a service, which failed
        raise UserError(f"no token of the hub ({type(error).__name__}): {LOGIN}") from error
    if not token:
        raise UserError(f"no token of the hub: {LOGIN}")
    return token


def plan(folder: str | Path, repo: str, tag: str = "", private: bool = False) -> Plan:
    """What a push of an exported folder would do; tag: step-N by default. UserError: no export, no such name."""
    folder = Path(folder)
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is not an exported folder: it has no {', '.join(missing)}")
    tag = tag or f"step-{_step(folder)}"
    check_names(repo, tag)
    files: dict[str, Path | bytes] = {name: folder / name for name in FILES if (folder / name).is_file()}
    files["README.md"] = (folder / "README.md").read_bytes().replace(HERE.encode(), repo.encode())
    others = sorted(p.name for p in folder.iterdir() if p.name not in FILES)
    return Plan(folder, repo, tag, private, files, tuple(others))


def _step(folder: Path) -> int:
    try:
        return int(json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/pretraining.json tells no step ({error!r}): export the run again") from error


def upload(plan: Plan, retag: bool = False, endpoint: str | None = None) -> Outcome:
    """Make the repository hold the plan's files under its tag. endpoint: another hub than HF_ENDPOINT.

    UserError: no token or no right, a public repository where a private one was asked for, a tag that holds other
    files (unless `retag`), a connection that broke.
    """
    from huggingface_hub import HfApi

    token = require_token()
    api = HfApi(endpoint=endpoint, token=token, library_name="hybridssl")
    url = f"{api.endpoint}/{plan.repo}/tree/{plan.tag}"
    with _one_line(plan, token):
        private = _ready(api, plan)
        tagged = plan.tag in {tag.name for tag in api.list_repo_refs(plan.repo).tags}
        if tagged and _is_there(api, plan, retag):
            return Outcome(url, False, private)
        commit = _commit(api, plan)
        if tagged:
            api.delete_tag(plan.repo, tag=plan.tag)
        api.create_tag(plan.repo, tag=plan.tag, revision=commit)
    return Outcome(url, True, private)


def _ready(api: HfApi, plan: Plan) -> bool:
    """Create the repository if there is none; whether it is private. UserError for a public one in place of private."""
    api.create_repo(plan.repo, private=plan.private or None, exist_ok=True)
    private = bool(api.model_info(plan.repo).private)
    if plan.private and not private:
        raise UserError(
            f"{plan.repo} exists and is public, so nothing was sent: make it private in its settings on the hub, "
            "name another, or leave --private out"
        )
    return private


def _is_there(api: HfApi, plan: Plan, retag: bool) -> bool:
    """Whether the plan's tag holds the plan's files. UserError when it holds others, unless it may be moved."""
    there = _parts(api, plan.repo, plan.tag)
    changed = [n for n in FILES if (n in plan.files or n in there) and not _same(plan.files.get(n), there.get(n))]
    if changed and not retag:
        raise UserError(
            f"{plan.repo} has a tag {plan.tag} with another {', '.join(changed)}, so nothing was sent: "
            "--revision NAME gives this export a tag of its own, --retag moves the old one to it"
        )
    return not changed


def _commit(api: HfApi, plan: Plan) -> str:
    """One commit of the whole plan -> its id. What the plan lacks goes: no old model.onnx stays by new weights."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added = [CommitOperationAdd(name, file) for name, file in plan.files.items()]
    stale = [CommitOperationDelete(name) for name in _parts(api, plan.repo, "main") if name not in plan.files]
    return api.create_commit(plan.repo, [*added, *stale], commit_message=f"{plan.tag}, exported by HybridSSL").oid


def _parts(api: HfApi, repo: str, revision: str) -> dict[str, str]:
    """Parts of an export in the repository -> sha256 of large files, git's sha1 of small ones."""
    from huggingface_hub.hf_api import RepoFile

    files = [f for f in api.list_repo_tree(repo, revision=revision) if isinstance(f, RepoFile) and f.path in FILES]
    return {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in files}


def _same(file: Path | bytes | None, digest: str | None) -> bool:
    if file is None or digest is None:
        return False
    if len(digest) == 64 and isinstance(file, Path):
        return sha256(file) == digest
    data = file if isinstance(file, bytes) else file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == digest


# --------------------------------------------------------------------------------------------------------- mishaps


@contextmanager
def _one_line(plan: Plan, token: str) -> Iterator[None]:
    """Whatever goes wrong on the way to the hub -> UserError in one line, without the token."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = not sys.stderr.isatty() and not are_progress_bars_disabled()
    try:
        if hidden:
            disable_progress_bars()
        with quiet():
            yield
    except UserError:
        raise
    except Exception as error:  # the HTTP library behind the client, and so its errors, differ between versions
        raise UserError(_reason(error, plan).replace(token, "***")) from error
    finally:
        if hidden:
            enable_progress_bars()


def _reason(error: BaseException, plan: Plan) -> str:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    again = f"`python -m hybridssl export {plan.folder} --push {plan.repo}` goes on with what is missing"
    chain = list(_chain(error))
    answer = next((e for e in chain if isinstance(e, HfHubHTTPError)), None)
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return f"nothing was sent to {plan.repo}, as HF_HUB_OFFLINE is set: unset it"
    if answer is None:
        root = chain[-1]
        mirror = "; HF_HUB_DISABLE_XET=1 is for a mirror that knows no Xet" if "xet-" in str(root) else ""
        return f"the upload to {plan.repo} broke ({type(root).__name__}: {_brief(root)}); {again}{mirror}"
    status, said = answer.response.status_code, _brief(answer.server_message or answer)
    if status == 401:
        return f"the hub does not accept the token (401): {LOGIN}"
    if status in (403, 404):
        return f"the token may not write to {plan.repo} ({status}: {said}): it needs the right to; {LOGIN}"
    if status == 400:
        return f"the hub refuses the upload to {plan.repo} (400: {said})"
    return f"the hub failed with {status} ({said}); {again}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _brief(said: object) -> str:
    return " ".join(str(said).split())[:200] or "no reason given"
