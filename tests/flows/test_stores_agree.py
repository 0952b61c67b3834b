"""One recipe with every stage on a local store and on S3: equal artifacts, taken up again, and early cut-off."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from artifacts import open_store
from flows.plan import plan
from flows.recipe import Recipe
from tests.every_stage import EVERY_STAGE, Done, local_run  # noqa: F401
from tests.in_process import assert_nothing_half_written, identifiers, run_here, states

ALL_CACHED = dict.fromkeys(EVERY_STAGE, "cached")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of a real S3 server on the loopback address."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    name = f"stores-{port}"  # moto keeps the buckets of all its servers of one process together
    S3FileSystem(endpoint_url=f"http://{host}:{port}").mkdir(name)
    yield f"s3://{name}/one"
    server.stop()


@pytest.mark.slow
def test_s3_holds_the_same_artifacts_and_has_them_again(local_run: Done, bucket: str) -> None:  # noqa: F811
    there = run_here(local_run.recipe, bucket)
    assert there["state"] == "ok", there
    assert set(states(there).values()) == {"ran"}
    assert identifiers(there) == identifiers(local_run.payload)
    assert_nothing_half_written(bucket, there)
    again = run_here(local_run.recipe, bucket)
    assert states(again) == ALL_CACHED
    assert identifiers(again) == identifiers(there)


@pytest.mark.slow
def test_equal_bytes_leave_what_follows_cached(local_run: Done) -> None:  # noqa: F811
    settings = ["rows.filters.max_characters=1000000"]
    decisions = plan(Recipe.load(str(local_run.recipe), settings), open_store(str(local_run.store))).decisions
    assert (decisions["rows"].state, decisions["sft"].state, decisions["pairs"].state) == ("run", "may_run", "cached")
    changed = run_here(local_run.recipe, local_run.store, settings)
    assert states(changed) == {**ALL_CACHED, "rows": "ran"}
    assert identifiers(changed) == identifiers(local_run.payload)
    assert_nothing_half_written(local_run.store, changed)
