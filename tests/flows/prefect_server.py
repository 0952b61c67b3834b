"""One real Prefect server for the tests of flows, what its API says, and the recipe that they run."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.pipeline import drain
from flows.server import temporary_server
from tests.flows.pipeline_stages import MAKE, World
from tests.prefect_homes import NewHome
from tests.waiting import until


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory, new_prefect_home: NewHome) -> Path:
    return new_prefect_home(tmp_path_factory.mktemp("prefect"))


@pytest.fixture(scope="session")
def server(prefect_home: Path) -> Iterator[str]:
    """It ends with the tests."""
    with temporary_server(prefect_home) as running:
        yield running.wait()
        drain()  # what this process still holds back would wait for a server that is gone


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr("stages.stage.STAGES", ("make",))
    module = types.ModuleType("stages.make")
    module.STAGE = MAKE
    monkeypatch.setitem(sys.modules, "stages.make", module)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return World(tmp_path)


@pytest.fixture
def api(server: str, monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.setenv("PREFECT_API_URL", server)
    return Api(server)


class Api:
    """What Prefect's API says about flow runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def flow_run(self, run_id: str) -> Any:
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_URL, temporary_settings

        suffix = run_id.rsplit("-", 1)[-1]
        with temporary_settings({PREFECT_API_URL: self.url}), get_client(sync_client=True) as client:
            found = [run for run in client.read_flow_runs() if run.name.startswith("small ")]
        found = [run for run in found if run.name.endswith(f" {suffix}")]
        assert len(found) == 1
        return found[0]

    def running(self, process: str) -> Any:
        """The id of a run that began, of a process."""
        from prefect.states import Running

        from flows.prefect_api import api
        from flows.prefect_flow import posttrain

        with api(self.url) as client:
            run = client.create_flow_run(posttrain, parameters={"recipe": "x"}, name="elsewhere", state=Running())
            client.update_flow_run(run.id, infrastructure_pid=process)
            return run.id

    def read(self, flow_run: Any) -> Any:
        """Its state."""
        from flows.prefect_api import api

        with api(self.url) as client:
            return client.read_flow_run(flow_run).state

    def task_states(self, run_id: str, count: int) -> dict[str, Any]:
        """Task name -> state, once `count` tasks have ended: Prefect records them a moment later."""
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
        from prefect.settings import PREFECT_API_URL, temporary_settings

        mine = FlowRunFilter(id=FlowRunFilterId(any_=[self.flow_run(run_id).id]))
        with temporary_settings({PREFECT_API_URL: self.url}), get_client(sync_client=True) as client:

            def ended() -> dict[str, Any] | None:
                runs = client.read_task_runs(flow_run_filter=mine)
                states = {run.name: run.state for run in runs if run.state and run.state.is_final()}
                return states if len(states) >= count else None

            return until(ended)


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
