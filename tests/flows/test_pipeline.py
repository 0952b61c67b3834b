"""Recipes as Prefect flows, on a real server: states in the API, payloads, failures, cancellation, leases."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from artifacts import Artifact, Store, open_store
from artifacts.errors import RequestError, StoreError
from flows import cli
from flows.pipeline import run_pipeline
from flows.plan import plan
from flows.run import Run
from tests.flows.pipeline_command import Command
from tests.flows.pipeline_stages import World
from tests.flows.prefect_server import Api, ended
from tests.prefect_homes import NewHome
from tests.waiting import LEFT_SECONDS, LIMIT_SECONDS, until

HERE = Path(__file__).parent


def states(payload: dict[str, Any]) -> dict[str, str]:
    return {name: entry["state"] for name, entry in payload["stages"].items()}


def text_of(world: World, alias: str) -> str:
    return (world.store.materialize(world.store.find(alias)) / "text").read_text()


def test_run_then_cached(world: World, api: Api) -> None:
    from prefect.events.worker import EventsWorker

    first = run_pipeline(world.plan())
    assert first["state"] == "ok" and set(states(first).values()) == {"ran"}
    assert sorted(world.ran()) == ["beside", "one", "three", "two"]
    assert text_of(world, "@small/three") == "123"  # each reads what the one before wrote
    assert text_of(world, "@small/three.dataset") == "123"
    assert {name: state.name for name, state in api.task_states(first["run"], 4).items()} == dict.fromkeys(
        ["one", "two", "three", "beside"], "Completed"
    )
    assert first["stages"]["three"]["metrics"] == {"length": 3}
    assert first["stages"]["three"]["inputs"] == {"source": [first["stages"]["two"]["outputs"]["dataset"]["id"]]}
    assert first["stages"]["one"]["command"][-1].endswith("/one/spec.json")
    assert world.store.read_run(first["run"]) == json.loads(json.dumps(first))

    workers = dict(EventsWorker._instances)
    second = run_pipeline(world.plan())
    assert workers and EventsWorker._instances == workers  # one that is drained is kept until the process ends
    assert second["state"] == "ok" and set(states(second).values()) == {"cached"}
    assert world.ran() == []
    shown = api.task_states(second["run"], 4)
    assert {state.name for state in shown.values()} == {"Cached"}
    assert shown["one"].message == f"done by run {first['run']}"
    assert api.flow_run(second["run"]).state.name == "Completed"
    for name in first["stages"]:
        assert second["stages"][name]["outputs"] == first["stages"][name]["outputs"]
        assert second["stages"][name]["metrics"] == first["stages"][name]["metrics"]


def test_failure_skips_what_follows_and_nothing_else(world: World, api: Api) -> None:
    payload = run_pipeline(world.plan("two.fail=rows.jsonl row 3 has no text"))
    assert payload["state"] == "failed"
    assert states(payload) == {"one": "ran", "two": "failed", "three": "skipped", "beside": "ran"}
    assert payload["stages"]["two"]["error"] == "rows.jsonl row 3 has no text"
    assert payload["stages"]["three"]["reason"] == "two failed"
    shown = api.task_states(payload["run"], 3)
    assert shown["two"].name == "Failed" and "rows.jsonl row 3 has no text" in shown["two"].message
    assert set(shown) == {"one", "two", "beside"}
    flow_run = api.flow_run(payload["run"])
    assert flow_run.state.name == "Failed" and "rows.jsonl row 3 has no text" in flow_run.state.message
    assert world.store.read_run(payload["run"])["state"] == "failed"
    with pytest.raises(RequestError):
        world.store.find("@small/two")

    again = run_pipeline(world.plan())
    assert states(again) == {"one": "cached", "two": "ran", "three": "ran", "beside": "cached"}


def test_what_failed_is_said_where_the_store_takes_no_end(
    world: World, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Store, run_id: str, payload: Any) -> None:
        raise StoreError("cannot write runs: no space left")

    monkeypatch.setattr(Store, "write_run", full)
    with pytest.raises(StoreError, match=r"^two: rows.jsonl row 3 has no text; cannot write runs: no space left$"):
        run_pipeline(world.plan("two.fail=rows.jsonl row 3 has no text"))


def test_a_stage_whose_result_got_no_name_gives_nothing(
    world: World, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Store, name: str, artifact: Artifact) -> None:
        raise StoreError(f"cannot write aliases/{name}.json: no space left")

    monkeypatch.setattr(Store, "set_alias", full)
    payload = run_pipeline(world.plan())
    assert states(payload) == {"one": "failed", "two": "skipped", "three": "skipped", "beside": "failed"}
    assert payload["stages"]["two"]["reason"] == "one failed"


def test_a_task_that_prefect_does_not_start_says_why(world: World, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: Run, name: str) -> None:
        raise ZeroDivisionError(f"{name} cannot be shown")

    monkeypatch.setattr("flows.prefect_flow.publish_stage", broken)
    payload = run_pipeline(world.plan(until=["two"]))
    assert states(payload) == {"one": "ran", "two": "failed", "three": "skipped", "beside": "skipped"}
    assert payload["stages"]["two"]["error"] == (
        "Prefect did not start it: the task one ended as Failed: Task run encountered an exception "
        "ZeroDivisionError: one cannot be shown. Run again: what is stored is not made again"
    )


def test_a_store_in_memory_is_refused_before_anything_starts(world: World, api: Api, tmp_path: Path) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.prefect_flow import posttrain

    (tmp_path / "small.yaml").write_text("stages: {one: {uses: make, with: {text: '1'}}}")
    refused = r"memory://x is in the memory of one process.*give a folder or s3://"
    with pytest.raises(RequestError, match=refused):
        run_pipeline(plan(world.recipe(), open_store("memory://x")))
    # else Prefect starts a server of its own, which it gives half a minute
    with temporary_settings({PREFECT_API_URL: api.url}), pytest.raises(RequestError, match=refused):
        posttrain(str(tmp_path / "small.yaml"), store="memory://x")
    assert open_store("memory://x").runs() == [] and world.ran() == []


def test_selection(world: World, api: Api) -> None:
    first = run_pipeline(world.plan(until=["one"]))
    assert states(first) == {"one": "ran", "two": "skipped", "three": "skipped", "beside": "skipped"}
    assert first["state"] == "ok"
    second = run_pipeline(world.plan(only=["two"]))
    assert states(second) == {"one": "skipped", "two": "ran", "three": "skipped", "beside": "skipped"}
    assert text_of(world, "@small/two") == "12"
    forced = run_pipeline(world.plan(only=["two"], force=["two"]))
    assert states(forced)["two"] == "ran"
    # the same bytes again: two records, one artifact
    assert forced["stages"]["two"]["outputs"] == second["stages"]["two"]["outputs"]


def test_inside_a_flow_of_ones_own(world: World, api: Api) -> None:
    from prefect import flow
    from prefect.settings import PREFECT_API_URL, temporary_settings

    @flow
    def mine() -> dict[str, Any]:
        return run_pipeline(world.plan(only=["one"]))

    with temporary_settings({PREFECT_API_URL: api.url}):
        payload = mine()
    assert payload["state"] == "ok"
    assert api.flow_run(payload["run"]).parent_task_run_id is not None


def test_two_runs_of_the_same_work_once(world: World) -> None:
    gate = world.folder / "gate"
    runs = [Run(world.plan(f"one.until={gate}", only=["one"])) for _ in range(2)]
    threads = [threading.Thread(target=run.execute, args=("one",)) for run in runs]
    for thread in threads:
        thread.start()
    until(lambda: (world.folder / "log").exists())
    gate.touch()
    for thread in threads:
        thread.join(LIMIT_SECONDS)
    assert sorted(run.entries["one"]["state"] for run in runs) == ["cached", "ran"]
    assert world.ran() == ["one"]


def test_an_api_that_does_not_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:  # nobody else is given its port meanwhile
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
        with pytest.raises(RequestError, match=rf"127.0.0.1:{port}.*does not answer.*unset it"):
            run_pipeline(world.plan())
    assert world.ran() == [] and world.store.runs() == []


@pytest.fixture
def own_home(new_prefect_home: NewHome, tmp_path: Path) -> Path:
    return new_prefect_home(tmp_path / "home")


def test_a_killed_run_is_listed_and_answers_for_what_it_finished(
    world: World, api: Api, prefect_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Command(world.folder, prefect_home, "two.until=never", "parallel=1", api=api.url)
    try:
        log = world.folder / "log"
        until(lambda: log.exists() and "two" in log.read_text().split())
        command.process.kill()
        command.process.communicate(timeout=LIMIT_SECONDS)
    finally:
        if command.process.poll() is None:
            command.process.kill()
    (run,) = world.store.runs()

    def ask(*arguments: str) -> Any:
        assert cli.main([*arguments, "--json", "--store", world.store.url]) == 0
        return json.loads(capsys.readouterr().out)

    assert [(found["run"], found["state"]) for found in ask("ls")["runs"]] == [(run, "killed")]
    bill = ask("ledger", run)["stages"]
    assert [(cost["stage"], cost["state"], "seconds" in cost) for cost in bill] == [
        ("one", "ran", True),
        ("two", "interrupted", False),
    ]
    assert ask("why", "two", "--run", run)["words"] == "the run was killed while this stage was at work"
    assert ask("why", "three", "--run", run)["words"] == "the run was killed before"
    page = world.folder / "run.html"
    ask("report", run, "-o", str(page))
    assert '<dd class="interrupted" data-count="interrupted">1</dd>' in page.read_text()
    assert api.flow_run(run).state.name == "Running"  # nobody told Prefect
    elsewhere = api.running("othermachine-1-1")
    # the run that goes on cites it, and both can be told apart
    again = run_pipeline(world.plan())
    crashed = api.flow_run(run).state
    assert crashed.name == "Crashed" and f"its process ({command.process.pid}) is gone" in crashed.message
    assert {name: state.name for name, state in api.task_states(run, 2).items()} == {
        "one": "Completed",
        "two": "Crashed",
    }
    assert api.read(elsewhere).name == "Running"  # who knows
    assert again["stages"]["one"]["reason"] == f"done by run {run}"
    assert {found["stage"]: found["states"] for found in ask("diff", run, again["run"])["stages"].values()} == {
        "one": ["ran", "cached"],
        "two": ["interrupted", "ran"],
        "three": ["skipped", "ran"],
        "beside": ["skipped", "ran"],
    }


def test_embedded_server_cached_run(world: World, api: Api, own_home: Path) -> None:
    run_pipeline(world.plan())
    world.ran()
    command = Command(world.folder, own_home)
    out, log = command.process.communicate(timeout=LIMIT_SECONDS)
    assert command.process.returncode == 0, log
    payload = json.loads(out)  # nothing but the payload on stdout
    assert set(states(payload).values()) == {"cached"} and world.ran() == []
    assert "small · run" in log and "three" in log
    # the database has it all when the command ends, so that a lasting server shows the run
    with sqlite3.connect(own_home / "prefect.db") as database:
        shown = database.execute(
            "select distinct t.state_name from task_run t join flow_run f on f.id = t.flow_run_id where f.name like ?",
            (f"%{payload['run'][-6:]}",),
        ).fetchall()
        events = dict(
            database.execute(
                "select e.event, count(*) from events e join flow_run f on e.resource_id = 'prefect.flow-run.' || f.id"
                " or e.related_resource_ids like '%' || f.id || '%' where f.name like ? group by e.event",
                (f"%{payload['run'][-6:]}",),
            )
        )
    assert shown == [("Cached",)]
    assert (events["prefect.flow-run.Completed"], events["prefect.task-run.Cached"]) == (1, 4)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -2), (signal.SIGKILL, -9)])
def test_a_run_that_is_ended_leaves_nothing(world: World, own_home: Path, number: int, status: int) -> None:
    command = Command(world.folder, own_home, "one.until=never", "beside.until=never")
    try:
        log = world.folder / "log"
        until(lambda: log.exists() and len(log.read_text().split()) == 2)
        left = command.descendants()
        assert len(left) >= 5  # Prefect's server, two supervisors, two stages
        going = world.store.read_run(world.store.runs()[0])
        assert going["state"] == "running"
        assert states(going) == {"one": "running", "two": "waiting", "three": "waiting", "beside": "running"}
        command.process.send_signal(number)
        until(lambda: all(map(ended, left)), LEFT_SECONDS)
        _, errors = command.process.communicate(timeout=LIMIT_SECONDS)
    finally:
        if command.process.poll() is None:
            command.process.kill()
    assert command.process.returncode == status, errors
    payload = world.store.read_run(world.store.runs()[0])
    assert payload["state"] == ("killed" if number == signal.SIGKILL else "interrupted")
    assert states(payload) == {"one": "interrupted", "two": "skipped", "three": "skipped", "beside": "interrupted"}
    assert payload["stages"]["one"]["error"] == (
        "the run was killed while this stage was at work"
        if number == signal.SIGKILL
        else "stage one was stopped because the run ended"
    )
