"""What a recipe takes from outside, where that cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from artifacts.errors import RequestError
from stages.external import hub_revision


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RequestError, match=r"Hub does not answer for model 'owner/name' .*\(ConnectError\).*network"):
        hub_revision("owner/name", "model")
