"""A Hub of this machine that takes uploads: repositories in memory, weights by LFS, and a commit for each push."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_writes"


@dataclass
class Held:
    """A repository."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


class FakeHub:
    """What was pushed, and how it misbehaves: `status` by part of a path; `spoil` changes what a commit keeps."""

    def __init__(self) -> None:
        self.repositories: dict[str, Held] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.status: dict[str, int] = {}
        self.spoil: Any = None

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """(status, JSON) of a request."""
        self.requests.append(f"{method} {path}")
        for part, status in self.status.items():
            if part in path:
                return status, {"error": "refused"}
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, self._batch(json.loads(body))
        if path.startswith("/upload/"):
            self.blobs[parts[1]] = body
            return 200, {}
        return self._of_repository("/".join(parts[1:4]), parts[4:], body)

    def _of_repository(self, key: str, rest: list[str], body: bytes) -> tuple[int, Any]:
        if (held := self.repositories.get(key)) is None:
            return 404, {"error": "none"}
        if rest[:1] == ["preupload"]:
            large = [one["path"].endswith((".safetensors", ".parquet")) for one in json.loads(body)["files"]]
            modes = zip(json.loads(body)["files"], large, strict=True)
            return 200, {
                "files": [
                    {"path": one["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
                    for one, lfs in modes
                ]
            }
        if rest[:1] == ["branch"]:
            if rest[1] in held.branches:
                return 409, {"error": "exists"}
            held.branches[rest[1]] = dict(held.branches["main"])
            return 200, {}
        if rest[:1] == ["commit"]:
            return 200, self._commit(key, held, rest[1], body)
        if rest[:1] == ["tree"]:
            return 200, [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in held.branches[rest[1]]]
        return 200, self._info(key, held, rest[1] if rest[:1] == ["revision"] else "main")

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        owner, name = asked["organization"], asked["name"]
        key = f"{asked.get('type', 'model')}s/{owner}/{name}"
        if key in self.repositories:
            return 409, {"error": "exists", "url": self._page(key)}
        self.repositories[key] = Held(asked["private"] if "private" in asked else asked["visibility"] == "private")
        return 200, {"url": self._page(key)}

    def _page(self, key: str) -> str:
        return f"{self.url}/{key.removeprefix('models/')}"

    def _batch(self, asked: dict[str, Any]) -> Any:
        def entry(one: dict[str, Any]) -> dict[str, Any]:
            actions = {"upload": {"href": f"{self.url}/upload/{one['oid']}", "header": {}}}
            return {**one, "actions": actions}

        return {"transfer": "basic", "objects": [entry(one) for one in asked["objects"]]}

    def _commit(self, key: str, held: Held, branch: str, body: bytes) -> Any:
        files = held.branches[branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                held.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if self.spoil is not None:
            self.spoil(files)
        oid = hashlib.sha1(f"{key}{len(held.commits)}".encode()).hexdigest()
        held.commits[oid] = dict(files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self._page(key)}/commit/{oid}"}

    def _info(self, key: str, held: Held, revision: str) -> Any:
        files = held.commits.get(revision) or held.branches.get(revision, {})
        siblings = []
        for name, content in files.items():
            one: dict[str, Any] = {"rfilename": name, "size": len(content)}
            one["blobId"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            if name.endswith((".safetensors", ".parquet")):
                digest = hashlib.sha256(content).hexdigest()
                one["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 1}
            siblings.append(one)
        return {"id": "/".join(key.split("/")[1:]), "private": held.private, "sha": revision, "siblings": siblings}

    url = ""


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serves one on a port of this machine; requests without TOKEN are refused."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}" or path.startswith("/upload/")
            status, answer = hub.answer(self.command, path, body) if allowed else (401, {"error": "who?"})
            said = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_POST = do_PUT = _any

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
