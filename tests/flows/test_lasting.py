"""A lasting Prefect as its users have it: a real server with a real worker, its API, and its pages in a browser."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import urllib.request
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.settings.models.flows import FlowsSettings
from prefect.states import Cancelling, Crashed, Pending, Running, Suspended

from artifacts import open_store
from artifacts.errors import RequestError
from artifacts.owner import machine, start_time
from flows.prefect_alerts import MOST_TRIES, Alerts
from flows.prefect_deploy import find
from flows.prefect_flow import posttrain
from flows.prefect_upkeep import AUTOMATION, SILENCE, crashed_when_silent, prepare
from tests.flows.lasting_ui import ALERT_PATH, Told, Ui, running_ui  # noqa: F401
from tests.tiny_recipe import TASK
from tests.waiting import LEFT_SECONDS, LIMIT_SECONDS, until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MANY = 1_000_000
"""Steps of a training that does not end during the tests."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scheduled(ui: Ui) -> Any:
    """The first run that a schedule started, once it has ended."""
    deployed = ui.command("deploy", str(ui.recipe), "--interval", "10", "--set", "steps=40", "--json")
    assert deployed.returncode == 0, deployed.stderr
    (row,) = json.loads(deployed.stdout)["deployments"]
    assert row["parameters"] == {"steps": 40}
    assert row["checked"] == {"by": "by the worker of pool posttrain", "stages": "3 run"}
    with ui.client() as client:

        def started() -> Any:
            found = [run for run in client.read_flow_runs() if run.state_name == "Running" and run.auto_scheduled]
            return found[0] if found else None

        run = until(started)
        assert ui.here("schedule", "pause", "tiny").returncode == 0
        return ui.ended(run, client)


def test_a_scheduled_run_starts_and_shows_itself(ui: Ui, scheduled: Any) -> None:
    assert scheduled.state_name == "Completed"
    assert re.fullmatch(r"tiny [0-9a-f]{6}", scheduled.name)  # as its deployment; its recipe's file is small.yaml
    with ui.client() as client:
        states = ui.tasks(scheduled, client, 3)
        shown = ui.artifacts(scheduled, client)
    assert {name: state.name for name, state in states.items()} == dict.fromkeys(("rows", "base", "sft"), "Completed")
    assert "| rows | run | first run |" in shown["plan-tiny"]
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


def test_a_sweep_shows_its_page(ui: Ui, scheduled: Any) -> None:
    """Of stages that are there already."""
    over = ("--over", "steps=40,41", "--only", "rows", "--name", "pair")
    swept = ui.command("sweep", str(ui.recipe), *over, "--json")
    assert swept.returncode == 0, swept.stderr
    first = json.loads(swept.stdout)["rows"][0]["run"]
    with ui.client() as client:
        (run,) = [found for found in client.read_flow_runs() if found.name == "sweep pair"]
        shown = ui.artifacts(run, client)
    link = re.search(rf"{ui.address}/reports/{first}\.sweep\.html", shown["sweep-report-pair"])
    assert link is not None
    with urllib.request.urlopen(link[0]) as answer:
        assert "<title>pair · tiny · posttrain sweep" in answer.read().decode()


def test_what_is_deployed_is_listed(ui: Ui, scheduled: Any) -> None:
    listed = json.loads(ui.here("schedule", "--json").stdout)["deployments"]
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
        refused = ui.here(*arguments)
        assert refused.returncode == 2 and words in refused.stderr, refused.stderr


def test_a_schedule_that_the_worker_could_not_run_is_refused(ui: Ui, scheduled: Any) -> None:
    """It has not the environment of whoever deploys."""
    judge = {"name": "judge", "parameters": {"model": "x", "template": "{prompt} {completion}"}}
    values = json.loads(ui.recipe.read_text())
    values["stages"]["scores"] = {
        "uses": "evaluate",
        "inputs": {"model": "base", "dataset": "rows"},
        "with": {"rewards": [judge]},
    }
    recipe = ui.recipe.with_name("judged.yaml")
    recipe.write_text(json.dumps({**values, "name": "judged"}))
    server = {"OPENAI_BASE_URL": "http://127.0.0.1:1/v1", "OPENAI_API_KEY": "x"}
    refused = ui.here("deploy", str(recipe), "--cron", "0 3 * * *", "--json", **server)
    assert refused.returncode == 2, refused.stdout
    problem, *_ = json.loads(refused.stdout)["problems"]
    assert problem["where"].startswith(f"{recipe}:") and "stages.scores.with.rewards" in problem["what"]
    assert "OPENAI_BASE_URL, which is not set" in problem["what"]
    with ui.client() as client:
        assert find(client, "judged") is None
        (run,) = [found for found in client.read_flow_runs() if found.state_name == "Refused"]
        assert re.fullmatch(r"check judged [0-9a-f]{6}", run.name)
        assert [found.name for found in client.read_deployments()] == ["tiny"]


def test_what_is_removed_is_said_to_be_gone(ui: Ui, scheduled: Any) -> None:
    assert ui.here("deploy", str(ui.recipe), "--name", "other", "--unchecked").returncode == 0
    removed = ui.here("schedule", "remove", "other")
    assert removed.stdout == (
        f"removed: other, which was on request and ran {ui.recipe}\nits runs, their results and reports stay\n"
    )
    left = json.loads(ui.here("schedule", "--json").stdout)["deployments"]
    assert [row["name"] for row in left] == ["tiny"]


def logs_of(run: Any) -> LogFilter:
    return LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))


def owner(process: subprocess.Popen[str]) -> str:
    """As a run says which process runs it."""
    return f"{machine()}-{process.pid}-{start_time(process.pid)}"


def test_the_form_chooses_stages_and_is_checked(ui: Ui, scheduled: Any) -> None:
    for wrong in ({"only": ["rwos"]}, {"parameters": {"stps": 1}}, {"parameters": {"steps": "many"}}, {"wrong": 1}):
        with pytest.raises(RequestError, match="refused: HTTP 4"):
            ui.ask(**wrong)
    run = ui.ask(only=["rows"], force=["rows"])
    with ui.client() as client:
        assert ui.ended(run, client).state_name == "Completed"
        states = ui.tasks(run, client, 1)
    assert {name: state.name for name, state in states.items()} == {"rows": "Completed"}  # and not Cached


def test_cancelled_in_training_then_resumed_then_crashed(ui: Ui, scheduled: Any) -> None:
    run = ui.ask(parameters={"steps": MANY})
    until(lambda: (ui.decision("sft", f"steps={MANY}").step or 0) > 0)
    with ui.client() as client:
        run = _suspended_then_resumed(ui, client, run)
        client.set_flow_run_state(run.id, Cancelling())
        until(lambda: not ui.processes(), LEFT_SECONDS)
        assert ui.ended(run, client).state_name == "Cancelled"
        assert {name: state.name for name, state in ui.tasks(run, client, 3).items()} == AT_WORK
        step = ui.decision("sft", f"steps={MANY}").step
        again = ui.ask(parameters={"steps": MANY})
        mine = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[again.id]))
        until(lambda: [log for log in client.read_logs(mine) if log.message == f"resumed at step {step}"])
        flow_process = next(found for found in ui.processes() if "prefect.engine" in found.cmdline())
        flow_process.kill()
        until(lambda: not ui.processes(), LEFT_SECONDS)
        assert ui.ended(again, client).state_name == "Crashed"
        assert ui.tasks(again, client, 3)["sft"].name == "Crashed"


AT_WORK = {"rows": "Cached", "base": "Cached", "sft": "Cancelled"}
"""Tasks of a run that was told to end while it trained."""


def _suspended_then_resumed(ui: Ui, client: Any, run: Any) -> Any:
    """Prefect notes both; without a run that looks, it trains on, and once more beside that after Resume."""
    client.set_flow_run_state(run.id, Suspended(timeout_seconds=600))
    until(lambda: not ui.processes(), LEFT_SECONDS)
    assert client.read_flow_run(run.id).state_name == "Suspended"
    assert {name: state.name for name, state in ui.tasks(run, client, 3).items()} == AT_WORK
    step = ui.decision("sft", f"steps={MANY}").step
    client.resume_flow_run(run.id)
    until(lambda: [log for log in client.read_logs(logs_of(run)) if log.message == f"resumed at step {step}"])
    return client.read_flow_run(run.id)


def test_a_stage_waits_for_slots_and_a_silent_run_has_crashed(ui: Ui, scheduled: Any) -> None:
    with ui.client() as client:
        client.upsert_global_concurrency_limit_by_name("gpu", 1)
        taken = client.increment_concurrency_slots_with_lease(["gpu"], 1, "concurrency", 3600).json()["lease_id"]
        client.update_deployment(scheduled.deployment_id, DeploymentUpdate(concurrency_limit=9))
        waiting, silent = (ui.ask(until=["base"], set=["launch.slots.gpu=1", f"base.seed={seed}"]) for seed in (1, 2))
        watch = client.create_automation(crashed_when_silent("at once", f"{silent.id}", timedelta(seconds=10)))

        def logged(run: Any, words: str) -> Any:
            mine = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
            return [log for log in client.read_logs(mine) if log.message.startswith(words)]

        def heartbeats(run: Any) -> int:
            # made anew each time: it looks for what happened until then
            wanted = EventFilter(
                event=EventNameFilter(name=["prefect.flow-run.heartbeat"]),
                resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
            )
            return int(client.read_events(wanted, limit=1).total)

        until(lambda: logged(silent, "waiting for 1 of 'gpu'") and heartbeats(silent))
        process = next(found for found in ui.processes() if found.environ()["PREFECT__FLOW_RUN_ID"] == f"{silent.id}")
        process.suspend()
        until(lambda: logged(waiting, "waiting for 1 of 'gpu'"))
        # what is cached waits for no slot, and of what waits nothing runs yet
        assert ui.tasks(waiting, client, 1)["rows"].name == "Cached"
        jobs = [found.environ()["POSTTRAIN_JOB"] for found in ui.processes()]
        assert not [job for job in jobs if job.startswith(f"{ui.store_folder}")]
        client.release_concurrency_slots_with_lease(taken)
        assert ui.ended(waiting, client).state_name == "Completed" and logged(waiting, "has 1 of 'gpu' after ")
        assert client.read_global_concurrency_limit_by_name("gpu").active_slots == 0
        crashed = ui.ended(silent, client).state
        assert (crashed.name, crashed.message.partition(":")[0]) == ("Crashed", "no heartbeat for 10 s")
        process.kill()
        until(lambda: not ui.processes(), LEFT_SECONDS)
        client.delete_automation(watch)
        client.update_deployment(scheduled.deployment_id, DeploymentUpdate(concurrency_limit=1))


def test_a_deployed_run_that_fails_is_told(ui: Ui, scheduled: Any) -> None:
    """Once, with its reason and its page; one that completed is not, and the address is nowhere to be read."""
    task = ui.recipe.parent / "task.py"
    before = task.read_text()
    task.write_text("def rows():\n    raise ValueError('no \"rows\" <here>')\n")
    try:
        run = ui.ask(only=["rows"])
        with ui.client() as client:
            run = ui.ended(run, client)
            assert run.state_name == "Failed"
            said = until(lambda: [log.message for log in client.read_logs(logs_of(run)) if log.level >= logging.ERROR])
    finally:
        task.write_text(before)
    assert not [text for text in said if "Traceback" in text]  # the reason alone
    (text,) = until(lambda: [text for text in ui.told.texts if run.name in text])
    assert re.match(r"tiny [0-9a-f]{6} failed: rows: ", text) and 'ValueError: no "rows" <here> (task.py:2)' in text
    assert text.endswith(f"\n{ui.address}/runs/flow-run/{run.id}")
    assert not any(scheduled.name in text for text in ui.told.texts)
    assert "deployed runs that fail are told to 127.0.0.1\n" in (ui.folder / "ui.log").read_text()
    read = 0
    for folder, _, names in os.walk(ui.folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # the database's journals come and go
                assert ALERT_PATH.encode() not in Path(folder, name).read_bytes(), name
                read += 1
    assert read > 10


def test_what_was_told_is_not_told_again(ui: Ui, scheduled: Any, tmp_path: Path) -> None:
    """An address that is busy is tried again, by this or another `posttrain ui`; one that never answers is given up."""
    said: list[str] = []
    told = Told()
    make = partial(Alerts, told.url, ui.address, tmp_path, said.append)
    alerts = make()
    with ui.client() as client:
        failed = _ended_badly(ui, client)
        told.answers = [500, 200]
        alerts.look(client)
        assert told.texts == []
        alerts = make()
        alerts.look(client)
        alerts.look(client)
        make().look(client)
        page = f"{ui.address}/runs/flow-run/{failed.id}"
        assert told.texts == [f"tiny: {failed.name} crashed: by hand\n{page}"]
        other = _ended_badly(ui, client)
        told.answers = [404] * MOST_TRIES
        for _ in range(MOST_TRIES + 2):
            alerts.look(client)
    assert told.answers == []
    told.shutdown()
    told.server_close()
    (tmp_path / "alerts.json").write_text('{"since": ')
    with ui.client() as client:
        beyond = Alerts(told.url, ui.address, tmp_path, said.append)
        wrong = Alerts(f"{told.url} x", ui.address, tmp_path / "other", said.append)
        wrong._note.parent.mkdir()
        last = _ended_badly(ui, client)
        beyond.look(client)
        wrong.look(client)
    *said, damaged, nobody, no_address = said
    assert damaged == f"{tmp_path}/alerts.json is damaged; runs that failed before now are not told"
    assert nobody.startswith(f"{last.name} failed, and 127.0.0.1 could not be told: ConnectionRefusedError: ")
    assert no_address == f"{last.name} failed, and 127.0.0.1 could not be told: InvalidURL; it is tried again"
    assert said == [
        f"{failed.name} failed, and 127.0.0.1 could not be told: HTTP 500; it is tried again",
        f"{other.name} failed, and 127.0.0.1 could not be told: HTTP 404; it is tried again",
        f"{other.name} failed, and 127.0.0.1 was not told in {MOST_TRIES} tries: HTTP 404",
    ]
    refused = ui.here("ui", POSTTRAIN_ALERT_URL="hooks.example.com/abc")
    assert refused.returncode == 2 and "POSTTRAIN_ALERT_URL is no address to post to" in refused.stderr
    assert "hooks.example.com" not in refused.stderr


def _ended_badly(ui: Ui, client: Any) -> Any:
    """A run of the deployment that no worker ever had."""
    deployment = find(client, "tiny")
    run = client.create_flow_run_from_deployment(deployment.id, state=Running())
    client.set_flow_run_state(run.id, Crashed(message="by hand"), force=True)
    return run


def test_a_run_that_beats_as_prefect_does_by_itself_is_not_silent() -> None:
    # `posttrain run` beside a lasting server: three heartbeats must be missing before it counts as gone
    assert timedelta(seconds=3 * FlowsSettings.model_fields["heartbeat_frequency"].default) <= SILENCE


def test_another_ui_finds_the_first_and_runs_report_to_it(ui: Ui) -> None:
    second, said = ui.start("--port", "0")
    assert second.wait(LIMIT_SECONDS) == 0
    assert (said["state"], said["address"], said["pid"]) == ("running before", ui.address, ui.process.pid)
    done = ui.command("run", str(ui.recipe), "--only", "rows", "--json")
    payload = json.loads(done.stdout)
    lines = [line for line in done.stderr.splitlines() if line.startswith("rows: ")]
    assert lines[-1].startswith(("rows: ran", "rows: cached")) and len(lines) == len(set(lines))
    assert "Task run" not in done.stderr and "Finished in state" not in done.stderr  # one line of ours is enough
    with ui.client() as client:
        names = {run.name: run for run in client.read_flow_runs()}
        run = names[f"tiny {payload['run'].rpartition('-')[2]}"]
        ui.tasks(run, client, 1)  # the command has sent that its task ended


def test_a_run_of_a_terminal_that_is_killed_has_crashed_at_once(ui: Ui) -> None:
    """Long before its heartbeats are missed."""
    run = ui.begin("run", str(ui.recipe), "--set", f"steps={MANY}", "--set", "sft.seed=3")
    with ui.client() as client:
        going = until(lambda: [found for found in client.read_flow_runs() if found.infrastructure_pid == owner(run)])[0]
        until(lambda: [log for log in client.read_logs(logs_of(going)) if log.message.startswith("step ")])
        assert client.read_flow_run(going.id).state_name == "Running"
        run.kill()
        run.wait()
        until(lambda: client.read_flow_run(going.id).state_name == "Crashed")
        assert "is gone and had not said how it ended" in client.read_flow_run(going.id).state.message
        assert ui.tasks(going, client, 3)["sft"].name == "Crashed"
    until(lambda: f"{going.name} crashed: its process ({run.pid})" in (ui.folder / "ui.log").read_text())


def test_a_port_that_is_taken_is_said(ui: Ui, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = ui.command("ui", "--port", str(port), PREFECT_HOME=str(tmp_path))
    assert refused.returncode == 2
    assert f"port {port} of 127.0.0.1 is taken by process {os.getpid()} (" in refused.stderr


def test_what_the_last_ui_left_is_put_right(ui: Ui) -> None:
    """Runs of a pool whose worker is gone: begun, about to begin, and missed."""
    with ui.client() as client:
        prepare(client, "left", {"left-gpu": 2})
        assert client.read_global_concurrency_limit_by_name("left-gpu").limit == 2
        flow = client.create_flow(posttrain)
        deployment = client.create_deployment(flow, "left", work_pool_name="left")

        def left(state: Any) -> Any:
            run = client.create_flow_run_from_deployment(deployment)
            client.set_flow_run_state(run.id, state, force=True)
            return run.id

        begun, about = left(Running()), left(Pending())
        said = prepare(client, "left", {"left-gpu": 3})
        assert client.read_flow_run(begun).state_name == "Crashed"
        assert client.read_flow_run(about).state_name == "Scheduled"
        assert len(said) == 2 and any("goes on from its last checkpoint" in line for line in said)
        assert client.read_global_concurrency_limit_by_name("left-gpu").limit == 3
        [watching] = client.read_automations_by_name(AUTOMATION)
        assert prepare(client, "left", {}) == []
        assert client.read_automations_by_name(AUTOMATION) == [watching]
        client.delete_automation(watching.id)
        client.create_automation(crashed_when_silent(silence=timedelta(seconds=180)))  # of an earlier version
        prepare(client, "left", {})
        assert [found.trigger for found in client.read_automations_by_name(AUTOMATION)] == [watching.trigger]
        client.delete_deployment(deployment)


def dom(page: str, folder: Path, *flags: str) -> str:
    """A page of the server once its scripts have asked the API and drawn."""
    assert CHROMIUM is not None, "CI=true asks for chromium"
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [CHROMIUM, *quiet, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", *flags, page]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True)
    return done.stdout


@pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true", reason="no chromium is installed (apt-get install chromium)"
)
def test_the_pages_of_a_run_and_of_its_form_in_a_browser(ui: Ui, scheduled: Any, tmp_path: Path) -> None:
    def shown(path: str, *words: str) -> str | None:
        text = dom(f"{ui.address}{path}", tmp_path, "--dump-dom", "--window-size=1400,1400")
        return text if all(word in text for word in words) else None

    run = until(
        lambda: shown(f"/runs/flow-run/{scheduled.id}", scheduled.name, "Completed", "3 Task runs", "storing model")
    )
    # what the page says when it does not reach its API
    assert "Can't connect" not in run and "Something went wrong" not in run
    until(
        lambda: shown(
            f"/deployments/deployment/{scheduled.deployment_id}/run", "The recipe's parameters.", ">steps", ">force"
        )
    )

    def pictured(page: str) -> int:
        dom(page, tmp_path, f"--screenshot={tmp_path / 'picture.png'}", "--window-size=1400,1400")
        return (tmp_path / "picture.png").stat().st_size

    blank = pictured("about:blank")
    until(lambda: pictured(f"{ui.address}/runs/flow-run/{scheduled.id}") > 5 * blank)  # it may be taken too early
