"""What tests of several folders use, and how several workers share them out (`pytest -n 2`)."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from flows.command import stage_variables
from tests.prefect_homes import new_prefect_home  # noqa: F401

# before torch is imported: a thread that waits and spins takes a core from the tests beside
os.environ.setdefault("GOMP_SPINCOUNT", stage_variables(1)["GOMP_SPINCOUNT"])
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# a test that names no server fails at once: Prefect would start one of its own, which takes long and reports nothing
os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")
os.environ.pop("COLUMNS", None)  # a worker has one of 80, and what goes into a pipe is as wide as it says

# the same examples each time, however long it takes to draw them
settings.register_profile("posttrain", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("posttrain")

gc.disable()  # until all modules are there: see pytest_collection_finish

TOGETHER = {
    # one user's processes are counted together
    "tests/rollouts/sandbox/": "sandbox",
    # all look at the run of `local_run`, which each worker would make for itself
    "tests/stages/test_golden.py": "every stage",
    "tests/stages/test_gate.py": "every stage",
    "tests/flows/test_stores_agree.py": "every stage",
    "tests/flows/test_tokens.py": "every stage",
}
"""Path or its beginning -> the name under which one worker takes all tests of that name. Other files go one by one."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker takes a whole file, so that fixtures of modules are made once and tests keep their order."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return next((name for beginning, name in TOGETHER.items() if path.startswith(beginning)), path)

    config.option.loadscopereorder = False  # the order is that of pytest_collection_modifyitems
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers, files with slow tests come first: at the end no worker waits for another one's."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What is imported by now stays. To look through its 800000 objects for garbage took a quarter of the collection,
    and later half a second each time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests keep in the cache, Prefect's database too, is neither the user's nor another worker's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_CACHE", str(tmp_path_factory.mktemp("posttrain_cache")))
        yield


@pytest.fixture(scope="session")
def warm_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Where to ask for processes that find all imported."""
    from tests.warm import warm

    with warm(tmp_path_factory.mktemp("warm"), {**os.environ, **stage_variables(1)}) as asked:
        yield asked


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product in float32 is oneDNN's, however small, whatever the processor."""
    import torch

    from stages.losses import products

    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "LEAST_WORK", 0)
    monkeypatch.setattr(products, "_has_faster_kernels", lambda: True)
