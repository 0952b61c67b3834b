"""A Hub of this machine that takes uploads: repositories in memory, weights by LFS, and a commit for each push.

As the real one it refuses a commit whose parent is not the branch's head any more, says at a preupload what it has, and
serves files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
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
    heads: dict[str, str] = field(default_factory=dict)

    def head(self, branch: str) -> str:
        """Of a branch that somebody wrote to otherwise than by a commit, a commit of its own."""
        files, last = self.branches[branch], self.heads.get(branch)
        if last is None or self.commits[last] != files:
            told = "".join(f"{name}:{hash_of(name, content)}" for name, content in sorted(files.items()))
            last = self.heads[branch] = hashlib.sha1(f"by hand {told}".encode()).hexdigest()
            self.commits[last] = dict(files)
        return last


def is_large(name: str) -> bool:
    """Whether it is kept by LFS."""
    return name.endswith((".safetensors", ".parquet"))


def hash_of(name: str, content: bytes) -> str:
    """As the Hub tells it."""
    if is_large(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class FakeHub:
    """What was pushed, and how it misbehaves: `status` by part of a path; `spoil` changes what a commit keeps;
    `meanwhile` are done one by one before a commit is looked at, and give a status to refuse it with, or None."""

    def __init__(self) -> None:
        self.repositories: dict[str, Held] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.status: dict[str, int] = {}
        self.spoil: Any = None
        self.meanwhile: list[Callable[[], int | None]] = []

    @property
    def uploads(self) -> list[str]:
        """Requests that wrote content."""
        return [one for one in self.requests if "/commit/" in one or "/upload/" in one]

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """(status, JSON or a file's bytes) of a request."""
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
        if "resolve" in parts:
            return self._file(parts)
        return self._of_repository("/".join(parts[1:4]), parts[4:], body)

    def _file(self, parts: list[str]) -> tuple[int, Any]:
        at = parts.index("resolve")
        key = "/".join(parts[:at] if at == 3 else ["models", *parts[:at]])
        commit, name = parts[at + 1], "/".join(parts[at + 2 :])
        content = self.repositories[key].commits[commit].get(name)
        return (404, {"error": "EntryNotFound"}) if content is None else (200, content)

    def _preupload(self, held: Held, branch: str, body: bytes) -> Any:
        there = held.branches[branch]
        names = [one["path"] for one in json.loads(body)["files"]]
        modes = {name: "lfs" if is_large(name) else "regular" for name in names}
        oids = {name: hash_of(name, there[name]) for name in names if name in there}
        told = [{"path": name, "uploadMode": mode, "oid": oids.get(name)} for name, mode in modes.items()]
        return {"files": [{**one, "shouldIgnore": False} for one in told]}

    def _of_repository(self, key: str, rest: list[str], body: bytes) -> tuple[int, Any]:
        if (held := self.repositories.get(key)) is None:
            return 404, {"error": "RepoNotFound"}
        if rest[:1] == ["preupload"]:
            return 200, self._preupload(held, rest[1], body)
        if rest[:1] == ["branch"]:
            if rest[1] in held.branches:
                return 409, {"error": "exists"}
            held.branches[rest[1]] = dict(held.branches["main"])
            return 200, {}
        if rest[:1] == ["commit"]:
            return self._commit(key, held, rest[1], body)
        revision = rest[1] if rest[:1] in (["revision"], ["tree"]) else "main"
        if revision not in held.branches and revision not in held.commits:
            return 404, {"error": "RevisionNotFound"}
        if rest[:1] == ["tree"]:
            files = held.commits[rest[1]]
            return 200, [{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in files]
        return 200, self._info(key, held, revision)

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
            if one["oid"] in self.blobs:  # what it has is not sent again
                return one
            actions = {"upload": {"href": f"{self.url}/upload/{one['oid']}", "header": {}}}
            return {**one, "actions": actions}

        return {"transfer": "basic", "objects": [entry(one) for one in asked["objects"]]}

    def _commit(self, key: str, held: Held, branch: str, body: bytes) -> tuple[int, Any]:
        refused = self.meanwhile.pop(0)() if self.meanwhile else None
        files, lines = held.branches[branch], [json.loads(line) for line in body.splitlines()]
        if refused is not None:
            return refused, {"error": "another operation is in progress"}
        if lines[0]["value"].get("parentCommit") not in (None, held.head(branch)):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        for line in lines:
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
        held.heads[branch] = oid
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self._page(key)}/commit/{oid}"}

    def _info(self, key: str, held: Held, revision: str) -> Any:
        commit = held.head(revision) if revision in held.branches else revision
        files = held.commits[commit]
        siblings = []
        for name, content in files.items():
            one: dict[str, Any] = {"rfilename": name, "size": len(content)}
            one["blobId"] = hash_of("", content)
            if is_large(name):
                one["lfs"] = {"size": len(content), "sha256": hash_of(name, content), "pointerSize": 1}
            siblings.append(one)
        return {"id": "/".join(key.split("/")[1:]), "private": held.private, "sha": commit, "siblings": siblings}

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
            said = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            if isinstance(answer, bytes):
                self.send_header("ETag", f'"{hash_of("", answer)}"')
                self.send_header("X-Repo-Commit", path.split("/resolve/")[1].split("/")[0])
            elif status == 404:
                self.send_header("X-Error-Code", answer["error"])
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(said)

        do_GET = do_HEAD = do_POST = do_PUT = _any

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
