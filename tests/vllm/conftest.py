"""These tests load vLLM into their process, which changes it; they run by themselves: `pytest -m vllm`.

Starting vLLM is most of what they take, so servers are shared, and so are runs of stages that several compare with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest

REASON = "vLLM is not installed; `make test-vllm` installs it"
TEST_SECONDS = 1200
TIED = {"tied": True, "untied": False}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if here in item.path.parents:
            item.add_marker("vllm")
            if item.get_closest_marker("timeout") is None:  # servers that are started may be a part of it
                item.add_marker(pytest.mark.timeout(TEST_SECONDS))
            if missing:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session", autouse=True)
def _started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Servers that some test will ask, on their way while other tests run."""
    with ExitStack() as stack:
        if any("servers" in getattr(item, "fixturenames", ()) for item in request.session.items):
            from tests.vllm.given import started
            from tests.vllm.models import save_model

            folder = tmp_path_factory.mktemp("models")
            for name, tied in TIED.items():
                for seed in (1, 2):
                    save_model(folder / name / str(seed), seed, tied=tied)
            models = {name: folder / name / "1" for name in TIED}
            yield stack.enter_context(started(models, tmp_path_factory.mktemp("logs"))), folder
        else:
            yield None


@pytest.fixture(scope="session")
def servers(_started: Any) -> tuple[dict[str, str], Path]:
    """(URLs of somebody else's servers of models "1", tied and untied, folder with these models and models "2")"""
    from tests.vllm.given import answering

    running, folder = _started
    return {name: answering(server) for name, server in running.items()}, folder


@pytest.fixture(params=list(TIED))
def server(request: pytest.FixtureRequest, servers: tuple[dict[str, str], Path]) -> tuple[str, Path]:
    """(URL, folder of models "1", which it was started with, and "2")"""
    urls, folder = servers
    return urls[request.param], folder / request.param


@pytest.fixture(scope="session")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """in_process(tied, lora_r) -> (rows of metrics, rollouts) of `rl` with vLLM in the process, run once."""
    from tests.vllm.test_stage import saved, trained

    @cache
    def run(tied: bool, lora_r: int | None) -> Any:
        folder = tmp_path_factory.mktemp("in_process")
        return trained("rl", saved(folder / "inputs", tied=tied), folder / "run", {"engine": "vllm"}, lora_r=lora_r)

    return run
