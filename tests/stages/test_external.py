"""What a recipe takes from outside, where that cannot be had."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from artifacts.errors import RequestError, StageError
from stages.context import local_context
from stages.hub import hub_revision

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ANSWERS = {
    "owner/unknown": (404, "RepoNotFound"),
    "owner/gated": (403, "GatedRepo"),
    "owner/disabled": (403, ""),
    "owner/moved": (404, "RevisionNotFound"),
    "owner/forbidden": (403, ""),
    "owner/broken": (500, ""),
    "owner/busy": (429, ""),
}
"""Repository -> HTTP status and error code with which a Hub answers."""


class Hub(BaseHTTPRequestHandler):
    """Refuses everything, each repository in its own way."""

    def do_GET(self) -> None:
        status, code = next(answer for name, answer in ANSWERS.items() if name in self.path)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if code:
            self.send_header("X-Error-Code", code)
        if "disabled" in self.path:
            self.send_header("X-Error-Message", "Access to this resource is disabled.")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits seconds between its tries."""
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A Hub of this machine in the place of the real one, and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    server.server_close()


def fetch(folder: Path, name: str) -> None:
    """As a stage does with an input that is a Hub model."""
    local_context("sft", {}, folder=folder).folder_of({"hub": name, "revision": COMMIT, "kind": "model"})


@pytest.mark.parametrize(
    ("name", "said", "at_a_commit"),
    [
        ("owner/unknown", r"^no model 'owner/unknown'{} on the Hub \(a private one needs HF_TOKEN\)$", True),
        ("owner/gated", r"^model 'owner/gated'{} on the Hub is gated: accept its terms .*, and set HF_TOKEN", True),
        ("owner/disabled", r"^the Hub has disabled model 'owner/disabled'{}; use another one, or give a folder", True),
        ("owner/forbidden", r"^the Hub refuses model 'owner/forbidden'{} \(HTTP 403\); set HF_TOKEN", True),
        ("owner/broken", r"^the Hub answers for model 'owner/broken'{} with HTTP 500; try again later", True),
        ("owner/busy", r"^the Hub answers for model 'owner/busy'{} with HTTP 429; try again later", True),
        ("owner/moved", r"^no model 'owner/moved'{} on the Hub; it may have been taken away: give another one", False),
    ],
)
def test_what_a_hub_refuses_is_said(hub: None, tmp_path: Path, name: str, said: str, at_a_commit: bool) -> None:
    with pytest.raises(StageError, match=said.format(f" at commit {COMMIT}")):
        fetch(tmp_path, name)
    if at_a_commit:
        with pytest.raises(RequestError, match=said.format("")):
            hub_revision(name, "model")


def test_a_hub_that_may_not_be_asked_is_said(hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = (
        r"^model 'owner/name'{} is not in the local cache .*/cache, and HF_HUB_OFFLINE forbids to ask the Hub; unset it"
    )
    with pytest.raises(StageError, match=said.format(f" at commit {COMMIT}")):
        fetch(tmp_path, "owner/name")
    with pytest.raises(RequestError, match=said.format("")):
        hub_revision("owner/name", "model")


def test_a_token_that_is_none_is_not_quoted(hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_sécret")
    with pytest.raises(StageError, match=r"^HF_TOKEN holds characters that no token has") as caught:
        fetch(tmp_path, "owner/unknown")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_a_full_disk_is_said(hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(StageError, match=r"^cannot keep model .* in .*/cache: No space left on device; .*HF_HOME"):
        fetch(tmp_path, "owner/name")


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = r"Hub does not answer for model 'owner/name'.*\(Connect\w*\).*network"
    with pytest.raises(RequestError, match=said):
        hub_revision("owner/name", "model")
    with pytest.raises(StageError, match=said):
        fetch(tmp_path, "owner/name")
