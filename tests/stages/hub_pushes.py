"""Pushes to a Hub of this machine, by the stage and the real client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.stages.fake_hub import TOKEN, FakeHub, fake_hub
from tests.stages.small_models import output, run_stage

MODEL = "models/owner/name"
ROWS = "datasets/owner/name"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub that is the only one known, with a token that may write, no pauses and empty caches."""
    with fake_hub() as found:
        use(monkeypatch, found.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setattr("stages.hub_upload.time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The Hub of that address from now on."""
    monkeypatch.setenv("HF_ENDPOINT", url)


def push(folder: Path, inputs: dict[str, Path], **settings: Any) -> dict[str, Any]:
    """What the stage's output says."""
    context = run_stage("push_to_hub", folder, inputs, **{"repo": "owner/name", **settings})
    said: dict[str, Any] = json.loads((output(context, "commit") / "commit.json").read_text())
    return said


def snapshot(files: dict[str, bytes], folder: Path) -> Path:
    """A branch as a person downloads it."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
