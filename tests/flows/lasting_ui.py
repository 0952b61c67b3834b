"""`posttrain ui` as a process, with a recipe that it runs, for the tests of a lasting Prefect."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun

from artifacts import open_store
from flows.cli import main
from flows.decision import Decision
from flows.plan import plan
from flows.prefect_api import api
from flows.prefect_deploy import find
from flows.recipe import Recipe
from tests.prefect_homes import NewHome
from tests.tiny_recipe import BASE, TASK
from tests.waiting import LIMIT_SECONDS, until

ROOT = Path(__file__).parents[2]
ALERT_PATH = "/hooks/5ea1ed-31337"
"""What is secret of the address that is told of failures."""


class Told(ThreadingHTTPServer):
    """Takes what is posted to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Post)
        self.texts: list[str] = []
        self.answers: list[int] = []
        """Statuses of the next answers; 200 once there are none."""
        self.url = f"http://127.0.0.1:{self.server_port}{ALERT_PATH}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Post(BaseHTTPRequestHandler):
    server: Told

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == ALERT_PATH and self.headers["Content-Type"] == "application/json" and list(body) == ["text"]
        status = self.server.answers.pop(0) if self.server.answers else 200
        if status == 200:
            self.server.texts.append(body["text"])
        self.send_response(status)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class Ui:
    """A recipe of rows, a model and its training, a store, and a `posttrain ui`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.told = folder, Told()
        self.home, self.store_folder = folder / "prefect", folder / "store"
        self.recipe = folder / "recipe" / "small.yaml"  # it calls itself tiny
        self.recipe.parent.mkdir()
        (self.recipe.parent / "task.py").write_text(TASK)
        training = {"learning_rate": 1e-3, "max_steps": "${steps}", "train_batch_size": 8, "checkpoint_steps": 20}
        stages = {
            "rows": BASE["rows"],
            "base": BASE["base"],
            "sft": {"uses": "sft", "inputs": {"model": "base", "dataset": "rows"}, "with": training},
        }
        values = {"name": "tiny", "parameters": {"steps": 30}, "launch": {"threads": 1}, "stages": stages}
        self.recipe.write_text(json.dumps(values))
        unset = ("PREFECT_API_URL", "PREFECT_PROFILE")
        self.environment = {name: value for name, value in os.environ.items() if name not in unset} | {
            "PREFECT_HOME": str(self.home),
            "POSTTRAIN_CACHE": str(folder / "cache"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "POSTTRAIN_ALERT_URL": self.told.url,
        }
        self.process, said = self.start("--port", "0")
        self.address, self.url = said["address"], said["api"]

    def start(self, *options: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """`posttrain ui` once it says where it is found."""
        command = [sys.executable, "-m", "flows.cli", "ui", "--json", "--store", str(self.store_folder), *options]
        log = self.folder / "ui.log"
        with open(log, "a") as errors:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            assert line, f"posttrain ui ended: {log.read_text()}"
            text += line
        return process, json.loads(text)

    def again(self) -> None:
        """It is ended as a reboot ends it, and another one started."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(LIMIT_SECONDS) == 0, (self.folder / "ui.log").read_text()
        assert self.processes() == []
        self.process, said = self.start("--port", "0")
        self.address, self.url = said["address"], said["api"]

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command beside it."""
        command = [sys.executable, "-m", "flows.cli", *arguments, "--store", str(self.store_folder)]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment | environment, capture_output=True, text=True
        )

    def here(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """As `command`, in this process, which has imported Prefect already: that takes two seconds."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.chdir(self.folder))
            stack.enter_context(mock.patch.dict(os.environ, self.environment | environment, clear=True))
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            status = main([*arguments, "--store", str(self.store_folder)])
        return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        """A command beside it that goes on."""
        command = [sys.executable, "-m", "flows.cli", *arguments, "--store", str(self.store_folder)]
        with open(self.folder / "begun.log", "a") as log:
            return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, text=True)

    def client(self) -> Any:
        """Of its API."""
        return api(self.url)

    def ask(self, **parameters: Any) -> FlowRun:
        """A run of the deployment with other parameters."""
        with self.client() as client:
            deployment = find(client, "tiny")
            assert deployment is not None
            run: FlowRun = client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
            return run

    def ended(self, run: FlowRun, client: SyncPrefectClient) -> FlowRun:
        """The run once it is in a final state."""

        def final() -> FlowRun | None:
            found = client.read_flow_run(run.id)
            return found if found.state is not None and found.state.is_final() else None

        return until(final)

    def tasks(self, run: FlowRun, client: SyncPrefectClient, count: int) -> dict[str, Any]:
        """Task name -> state, once `count` of them are final: Prefect records them a moment later."""
        mine = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))

        def final() -> dict[str, Any] | None:
            found = client.read_task_runs(flow_run_filter=mine)
            states = {task.name: task.state for task in found if task.state is not None and task.state.is_final()}
            return states if len(states) >= count else None

        return until(final)

    def artifacts(self, run: FlowRun, client: SyncPrefectClient) -> dict[str, Any]:
        """Key -> data, the newest of each key."""
        mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        found = sorted(client.read_artifacts(artifact_filter=mine, limit=200), key=lambda artifact: artifact.created)
        return {artifact.key: artifact.data for artifact in found}

    def decision(self, stage: str, *overrides: str) -> Decision:
        """What a run would do with a stage now."""
        store = open_store(str(self.store_folder))
        return plan(Recipe.load(str(self.recipe), overrides), store).decisions[stage]

    def processes(self) -> list[psutil.Process]:
        """Stages, their supervisors and the processes of runs, but neither server nor worker."""
        found = []
        for process in psutil.process_iter():
            try:
                mark = process.environ().get("POSTTRAIN_JOB", "")
                mine = mark.startswith(str(self.store_folder)) or (
                    mark.startswith(str(self.home)) and "PREFECT__FLOW_RUN_ID" in process.environ()
                )
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module", name="ui")
def running_ui(tmp_path_factory: pytest.TempPathFactory, new_prefect_home: NewHome) -> Iterator[Ui]:
    """One server and worker for all tests of a file; at the end SIGTERM ends it, and leaves nothing."""
    folder = tmp_path_factory.mktemp("lasting")
    new_prefect_home(folder / "prefect")
    running = Ui(folder)
    try:
        yield running
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(LIMIT_SECONDS) == 0, (running.folder / "ui.log").read_text()
        assert running.processes() == []
    finally:
        running.process.kill()
