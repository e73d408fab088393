"""A stand-in of the hub on loopback: the HTTP interface that huggingface_hub speaks, in memory, with faults on demand.

It keeps repositories as lists of commits (path -> bytes), tags, and a store of large files by sha256, and notes every
request. A Fault answers the next `times` requests that match, with a status or by cutting the connection halfway
through the body.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_good_token_of_the_test"
CUT = 0  # in place of a status


@dataclass
class Fault:
    request: str  # pattern of "METHOD /path"
    status: int
    times: int = 1
    text: str = ""


@dataclass
class Repo:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.safetensors lfs\n"}])
    tags: dict[str, int] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[int, dict[str, bytes]]:
        number = len(self.commits) - 1 if revision == "main" else self.tags.get(revision, -1)
        number = next((n for n in range(len(self.commits)) if oid(n) == revision), number)
        if number < 0:
            raise KeyError(revision)
        return number, self.commits[number]


def oid(number: int) -> str:
    return f"{number:040x}"


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def large(path: str) -> bool:
    return path.endswith((".safetensors", ".onnx"))


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self.lock = threading.RLock()

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            self.seen.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.request, request):
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news here."""


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        fault = self.server.fault(request)
        if fault and fault.status == CUT:
            self.rfile.read(int(self.headers.get("Content-Length") or 2) // 2)
            self.close_connection = True
            return None
        body = self._body()
        if fault:
            return self._answer(fault.status, {"error": fault.text or "a fault of the test"})
        if not OPEN.match(request) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": f"no such token: {self.headers.get('Authorization')}"})
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, request):
                with self.server.lock:
                    return method(self, body, *match.groups())
        return self._answer(404, {"error": f"no route for {request}"})

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, document: Any = None, data: bytes | None = None, **headers: str) -> None:
        content = json.dumps(document).encode() if data is None else data
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ------------------------------------------------------------------------------------------------------ routes

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.server.repos
        self.server.repos.setdefault(name, Repo(asked.get("visibility") == "private"))
        self._answer(409 if known else 200, {"url": f"{self.server.endpoint}/{name}", "error": "it exists"})

    def about(self, body: bytes, name: str, revision: str | None) -> None:
        repo = self.server.repos[name]
        self._answer(200, {"id": name, "private": repo.private, "sha": oid(repo.at(revision or "main")[0])})

    def refs(self, body: bytes, name: str) -> None:
        repo = self.server.repos[name]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": oid(len(repo.commits) - 1)}
        tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": oid(n)} for t, n in repo.tags.items()]
        self._answer(200, {"branches": [main], "converts": [], "tags": tags})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        rows = []
        for path, data in self.server.repos[name].at(revision)[1].items():
            row = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
            if large(path):
                digest = hashlib.sha256(data).hexdigest()
                row |= {"oid": git_sha1(digest.encode()), "lfs": {"oid": digest, "size": len(data), "pointerSize": 134}}
            rows.append(row)
        self._answer(200, rows)

    def validate(self, body: bytes) -> None:
        found = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        errors = [] if found and isinstance(yaml.safe_load(found[1]), dict) else [{"message": "no metadata"}]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        there, files = self.server.repos[name].at(revision)[1], []
        for file in json.loads(body)["files"]:
            row: dict[str, Any] = {"path": file["path"], "shouldIgnore": False}
            row["uploadMode"] = "lfs" if large(file["path"]) else "regular"
            if (data := there.get(file["path"])) is not None:
                row["oid"] = hashlib.sha256(data).hexdigest() if large(file["path"]) else git_sha1(data)
            files.append(row)
        self._answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            href = f"{self.server.endpoint}/store/{asked['oid']}"
            new = {} if asked["oid"] in self.server.store else {"actions": {"upload": {"href": href}}}
            objects.append({**asked, **new})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, digest: str) -> None:
        if hashlib.sha256(body).hexdigest() != digest:
            return self._answer(400, {"error": "other content than announced"})
        self.server.store[digest] = body
        return self._answer(200, {})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        repo, files = self.server.repos[name], {}
        files.update(repo.at(revision)[1])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.store[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        repo.commits.append(files)
        number = oid(len(repo.commits) - 1)
        self._answer(200, {"commitUrl": f"{self.server.endpoint}/{name}/commit/{number}", "commitOid": number})

    def tag(self, body: bytes, name: str, revision: str) -> None:
        repo, wanted = self.server.repos[name], json.loads(body)["tag"]
        if wanted in repo.tags:
            return self._answer(409, {"error": "there is such a tag"})
        repo.tags[wanted] = repo.at(revision)[0]
        return self._answer(200, {})

    def untag(self, body: bytes, name: str, tag: str) -> None:
        del self.server.repos[name].tags[tag]
        self._answer(200, {})

    def resolve(self, body: bytes, method: str, name: str, revision: str, path: str) -> None:
        number, files = self.server.repos[name].at(revision)
        if path not in files:
            return self._answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
        digest = hashlib.sha256(files[path]).hexdigest()
        return self._answer(200, data=files[path], ETag=f'"{digest}"', X_Repo_Commit=oid(number))


NAME = r"([\w.-]+/[\w.-]+)"
OPEN = re.compile(f"PUT /store/|(GET|HEAD) /{NAME}/resolve/")  # a signed address; a public repository
ROUTES = [
    ("POST /api/repos/create", Handler.create),
    (f"GET /api/models/{NAME}(?:/revision/(.+))?", Handler.about),
    (f"GET /api/models/{NAME}/refs", Handler.refs),
    (f"GET /api/models/{NAME}/tree/(.+)", Handler.tree),
    ("POST /api/validate-yaml", Handler.validate),
    (f"POST /api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (f"POST /{NAME}[.]git/info/lfs/objects/batch", Handler.batch),
    ("PUT /store/(.+)", Handler.put),
    (f"POST /api/models/{NAME}/commit/(.+)", Handler.commit),
    (f"POST /api/models/{NAME}/tag/(.+)", Handler.tag),
    (f"DELETE /api/models/{NAME}/tag/(.+)", Handler.untag),
    (f"(GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
