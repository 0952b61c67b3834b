"""Stores of every kind, and folders to put into them."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from artifacts import Store, open_store, s3


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of a real S3 server on the loopback address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }


@pytest.fixture
def s3_environment(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in environment(s3_server).items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def s3_client(s3_server: str) -> Any:
    """One client for all tests: making one takes half a second. It holds the bucket `stores`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(s3_server).items():
            patch.setenv(name, value)
        client = s3._file_system()
        client.mkdir("stores")
        yield client


@pytest.fixture
def bucket(s3_environment: str, s3_client: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(s3, "_file_system", lambda: s3_client)
    return "s3://stores"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("POSTTRAIN_CACHE", str(folder))
    monkeypatch.delenv("POSTTRAIN_STORE", raising=False)
    return folder


@pytest.fixture(params=["local", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh store of each kind."""
    if request.param == "local":
        return str(tmp_path / "store")
    if request.param == "memory":
        return f"memory://{tmp_path.name}"
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url)


@pytest.fixture
def fill(tmp_path: Path) -> Callable[..., Path]:
    """`fill({"a/b": b"..."})` -> a new folder with these files."""
    made = 0

    def make(files: dict[str, bytes], name: str | None = None) -> Path:
        nonlocal made
        made += 1
        folder = tmp_path / "made" / (name or str(made))
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    return make
