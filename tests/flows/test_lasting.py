"""A lasting Prefect as its users have it: a real server with a real worker and its API."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest

from artifacts import open_store
from tests.flows.lasting_ui import Ui, until
from tests.tiny_recipe import TASK

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        metadata.version("sqlalchemy") >= "2.1" and os.environ.get("CI") != "true",
        reason="this SQLAlchemy is not the one that pyproject.toml asks for (pip install 'sqlalchemy<2.1')",
    ),
]


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    """One server and worker for all tests of this file; at the end SIGTERM ends it, and leaves nothing."""
    running = Ui(tmp_path_factory.mktemp("lasting"))
    try:
        yield running
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0, (running.folder / "ui.log").read_text()
        assert running.processes() == []
    finally:
        running.process.kill()


@pytest.fixture(scope="module")
def scheduled(ui: Ui) -> Any:
    """The first run that a schedule started, once it has ended."""
    deployed = ui.command("deploy", str(ui.recipe), "--interval", "10", "--set", "steps=40", "--json")
    assert deployed.returncode == 0, deployed.stderr
    assert json.loads(deployed.stdout)["deployments"][0]["parameters"] == {"steps": 40}
    with ui.client() as client:

        def started() -> Any:
            found = [run for run in client.read_flow_runs() if run.state_name == "Running" and run.auto_scheduled]
            return found[0] if found else None

        run = until(started)
        assert ui.command("schedule", "pause", "tiny").returncode == 0
        return ui.ended(run, client)


def test_a_scheduled_run_starts_and_shows_itself(ui: Ui, scheduled: Any) -> None:
    assert scheduled.state_name == "Completed"
    assert re.fullmatch(r"tiny [0-9a-f]{6}", scheduled.name)
    with ui.client() as client:
        states = ui.tasks(scheduled, client, 3)
        shown = ui.artifacts(scheduled, client)
    assert {name: state.name for name, state in states.items()} == dict.fromkeys(("rows", "base", "sft"), "Completed")
    assert "| rows | run | first run: nothing like it in the store |" in shown["plan-tiny"]
    assert shown["progress-sft"] == 100.0
    store = open_store(str(ui.store_folder))
    payload = store.read_run(next(run for run in store.runs() if run.endswith(scheduled.name[-6:])))
    trained = payload["stages"]["sft"]
    assert {row["metric"] for row in json.loads(shown["metrics-sft"])} == set(trained["metrics"])
    model = trained["outputs"]["model"]["id"].removeprefix("sha256:")
    assert f"{ui.store_folder}/artifacts/model/{model}" in shown["lineage-tiny"]
    assert (ui.store_folder / "artifacts" / "model" / model).is_dir()
    link = re.search(rf"{ui.address}/reports/{payload['run']}\.html", shown["report-tiny"])
    assert link is not None
    with urllib.request.urlopen(link[0]) as answer:
        assert f"<title>tiny · {payload['run']}" in answer.read().decode()


def test_what_is_deployed_is_listed(ui: Ui, scheduled: Any) -> None:
    listed = json.loads(ui.command("schedule", "--json").stdout)["deployments"]
    assert [(row["name"], row["state"], row["schedule"]) for row in listed] == [("tiny", "paused", ["every 0:00:10"])]
    other = ui.folder / "tiny.yaml"
    other.write_text(ui.recipe.read_text())
    (ui.folder / "task.py").write_text(TASK)
    for arguments, words in (
        (("schedule", "pause", "tny"), "there is no deployment 'tny'; did you mean 'tiny'?"),
        (("deploy", str(other)), "the deployment 'tiny' is of another recipe"),
        (("schedule", "remove"), "say which: posttrain schedule remove NAME"),
        (("deploy", str(ui.recipe), "--cron", "0 3 * *"), "Invalid cron string"),
        (("deploy", str(ui.recipe), "--pool", "postrain"), "no work pool 'postrain'; did you mean 'posttrain'?"),
        (("deploy", str(ui.recipe), "--set", "stps=3"), "nothing named 'stps' can be set; did you mean 'steps'?"),
    ):
        refused = ui.command(*arguments)
        assert refused.returncode == 2 and words in refused.stderr, refused.stderr
