"""Which Prefect API a run reports to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from artifacts.errors import StageError
from flows.server import configured_url, loopback_without_proxy, temporary_server


def test_the_api_of_the_active_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("PREFECT_PROFILE", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert configured_url() is None
    profiles = 'active = "b"\n[profiles.a]\n[profiles.b]\nPREFECT_API_URL = "http://b/api"\n'
    (tmp_path / "profiles.toml").write_text(profiles)
    assert configured_url() == "http://b/api"
    monkeypatch.setenv("PREFECT_PROFILE", "a")
    assert configured_url() is None
    monkeypatch.setenv("PREFECT_API_URL", "http://c/api")
    assert configured_url() == "http://c/api"


def test_the_loopback_address_needs_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "inside.example")
    monkeypatch.delenv("no_proxy", raising=False)
    with loopback_without_proxy():
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "inside.example,127.0.0.1"
    assert os.environ["NO_PROXY"] == "inside.example" and "no_proxy" not in os.environ


def test_a_temporary_server_that_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "prefect.db").mkdir()  # no database can be opened there
    with pytest.raises(StageError, match=r"Prefect's server ended: .*PREFECT_API_URL"):
        with temporary_server(tmp_path) as server:
            server.wait()
