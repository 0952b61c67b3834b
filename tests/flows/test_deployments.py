"""Deployments at a real Prefect server: what they say of themselves, what a later `deploy` changes, and what
happens to their runs when they go. Nothing of this needs a worker."""

from __future__ import annotations

import calendar
import io
import itertools
import json
import os
import re
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, FlowRun
from prefect.states import Cancelled, Cancelling, Completed, Pending, Running, Scheduled
from rich.console import Console

from artifacts import open_store
from artifacts.errors import RequestError
from flows.cli import main
from flows.prefect_api import api
from flows.prefect_cancel import ask
from flows.prefect_check import all_checked, look
from flows.prefect_deploy import Deployable, When, deploy, find
from flows.prefect_flow import posttrain
from flows.prefect_interrupted import drop_checks, go_on
from flows.prefect_schedule import pause, remove, resume, rows
from flows.prefect_skipped import LIMIT_REACHED, name_skipped
from flows.prefect_upkeep import UNTAKEN, prepare, stop_runs
from flows.schedule_table import of_paused, schedule_table
from flows.server import temporary_server
from tests.prefect_homes import NewHome
from tests.tiny_recipe import write_recipe

POOL = "posttrain"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, new_prefect_home: NewHome) -> Iterator[str]:
    """The API of a server with a work pool."""
    with temporary_server(new_prefect_home(tmp_path_factory.mktemp("prefect"))) as server:
        with api(server.wait()) as client:
            prepare(client, POOL, {})
        yield server.url


@pytest.fixture
def client(url: str) -> Iterator[SyncPrefectClient]:
    with api(url) as made:
        yield made


def test_a_deployment_with_a_run_that_has_not_ended_stays(client: SyncPrefectClient, url: str, tmp_path: Path) -> None:
    what = Deployable.read(str(write_recipe(tmp_path, {})), [])
    made = deploy(client, what, "busy", When(interval_seconds=3600), pool=POOL, store="a store")
    run = client.create_flow_run_from_deployment(made.id)
    for state in (None, Pending(), Running()):  # also what was asked for and has not begun
        if state is not None:
            assert client.set_flow_run_state(run.id, state).status.name == "ACCEPT"
        with pytest.raises(RequestError, match=re.escape(f"{run.name!r} has not ended")) as refused:
            remove(client, ["busy"])
        assert f"cancel it at {url.removesuffix('/api')}/runs/flow-run/{run.id}" in str(refused.value)
    assert rows(client, ["busy"])[0]["state"] == "scheduled"  # as it was
    assert client.set_flow_run_state(run.id, Completed()).status.name == "ACCEPT"
    assert [gone["name"] for gone in remove(client, ["busy"])] == ["busy"]
    assert find(client, "busy") is None
    assert client.read_flow_run(run.id).state_name == "Completed"


def test_what_is_paused_starts_nothing(client: SyncPrefectClient, tmp_path: Path) -> None:
    """Prefect's own pause leaves what was asked for and what waits for a slot, of which a worker starts one by one."""
    what = Deployable.read(str(write_recipe(tmp_path, {})), [])
    made = deploy(client, what, "queue", When(interval_seconds=3600), pool=POOL, store="a store")
    going, asked, waiting = (client.create_flow_run_from_deployment(made.id) for _ in range(3))
    for state in (Pending(), Running()):
        client.set_flow_run_state(going.id, state)
    client.set_flow_run_state(waiting.id, Scheduled(name="AwaitingConcurrencySlot"), force=True)
    [row] = pause(client, ["queue"])
    assert (row["state"], set(row["cancelled"]), row["going"]) == ("paused", {asked.name, waiting.name}, [going.name])
    assert [client.read_flow_run(run.id).state_name for run in (asked, waiting)] == ["Cancelled", "Cancelled"]
    assert list(of_paused(row)) == [
        f"queue: 2 queued runs that had not begun will not run: {', '.join(row['cancelled'])}",
        f"queue: its run {going.name!r} goes on; `posttrain cancel {going.name}` ends it",
    ]
    assert [row["last"]["run"] for row in rows(client, ["queue"])] == [going.name]  # no other one began
    client.set_flow_run_state(going.id, Completed())


def test_a_run_that_stays_scheduled_all_the_same_is_told_once(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a pause would look for it again and again. Here the server never hears of one of two."""
    what = Deployable.read(str(write_recipe(tmp_path, {})), [])
    made = deploy(client, what, "stubborn", When(), pool=POOL, store="a store")
    stays, goes = (client.create_flow_run_from_deployment(made.id) for _ in range(2))
    told: list[UUID] = []

    def tell(client: SyncPrefectClient, run: FlowRun) -> None:
        assert run.id not in told
        told.append(run.id)
        if run.id != stays.id:
            ask(client, run)

    monkeypatch.setattr("flows.prefect_schedule.ask", tell)
    pause(client, ["stubborn"])
    assert set(told) == {stays.id, goes.id}
    assert client.read_flow_run(stays.id).state.is_scheduled()
    assert client.read_flow_run(goes.id).state_name == "Cancelled"


def test_a_run_that_no_worker_ends_keeps_its_deployment(client: SyncPrefectClient, tmp_path: Path) -> None:
    what = Deployable.read(str(write_recipe(tmp_path, {})), [])
    made = deploy(client, what, "stuck", When(interval_seconds=3600), pool=POOL, store="a store")
    run = client.create_flow_run_from_deployment(made.id)
    for state in (Pending(), Running()):
        client.set_flow_run_state(run.id, state)
    with pytest.raises(RequestError, match=rf"{run.name!r} was told to end 0 s ago and has not \(Cancelling\); does"):
        remove(client, ["stuck"], cancel=True, wait_seconds=0.3)
    assert rows(client, ["stuck"])[0]["state"] == "scheduled"  # as it was
    client.set_flow_run_state(run.id, Cancelled(), force=True)
    assert [gone["cancelled"] for gone in remove(client, ["stuck"], cancel=True)] == [[]]


def test_a_run_that_meets_another_one_is_skipped(client: SyncPrefectClient, tmp_path: Path) -> None:
    """Here a worker is played: it asks for the slot by setting the run to Pending."""
    what = Deployable.read(str(write_recipe(tmp_path, {})), [])
    made = deploy(client, what, "often", When(interval_seconds=10), pool=POOL, store="a store")
    first, second = (client.create_flow_run_from_deployment(made.id) for _ in range(2))
    assert client.set_flow_run_state(first.id, Pending()).status.name == "ACCEPT"
    assert client.set_flow_run_state(second.id, Pending()).status.name == "REJECT"
    assert list(name_skipped(client)) == []  # the first one is called otherwise once it has begun
    assert client.set_flow_run_state(first.id, Running()).status.name == "ACCEPT"
    met = client.read_flow_run(second.id)
    assert (met.state_name, met.state.message) == ("Cancelled", LIMIT_REACHED)
    [row] = rows(client, ["often"])  # also where no `posttrain ui` gives it its state
    assert (row["last"]["run"], row["skipped"]["run"]) == (first.name, second.name)
    words = f"{first.name} was still in progress, and a deployment has one run at a time; ask again when it has ended"
    [line] = name_skipped(client)
    assert line.startswith(f"often: {second.name}, asked for at 20") and line.endswith(f" UTC, was skipped: {words}")
    named = client.read_flow_run(second.id)
    assert (named.state_name, named.state.message) == ("Skipped", words)
    assert list(name_skipped(client)) == []
    [again] = rows(client, ["often"])
    assert again["skipped"] == row["skipped"]
    client.set_flow_run_state(first.id, Completed())
    third = client.create_flow_run_from_deployment(made.id)
    assert client.set_flow_run_state(third.id, Pending()).status.name == "ACCEPT"
    client.set_flow_run_state(third.id, Cancelled(), force=True)


def test_runs_whose_deployment_was_deleted_in_the_pages_can_end(client: SyncPrefectClient) -> None:
    """Prefect answers each end of such a run with HTTP 500; `posttrain ui` ends, and starts again, all the same."""
    one = ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
    flow = client.create_flow(posttrain)

    def begun(name: str, *states: Any, keep: bool = False) -> Any:
        made = client.create_deployment(flow, name, work_pool_name=POOL, concurrency_limit=1, concurrency_options=one)
        run = client.create_flow_run_from_deployment(made)
        for state in states:
            assert client.set_flow_run_state(run.id, state).status.name == "ACCEPT"
        if not keep:
            client.delete_deployment(made)
        return run

    ended, working = begun("ended", Pending(), Running()), begun("working", Pending(), Running())
    done, stuck = begun("done", Pending(), Running(), keep=True), begun("stuck", Pending(), Running(), keep=True)
    with subprocess.Popen(["sleep", "600"], env={**os.environ, "PREFECT__FLOW_RUN_ID": f"{working.id}"}) as process:
        client.update_flow_run(working.id, infrastructure_pid=f"here:{process.pid}")

        def worker() -> bool:
            process.kill()
            client.set_flow_run_state(working.id, Cancelled(), force=True)
            client.set_flow_run_state(done.id, Completed(), force=True)
            return False

        said = stop_runs(client, POOL, worker)
    assert set(said) == {
        f"{ended.name} crashed: {UNTAKEN}",
        f"{working.name} was cancelled; its next run goes on from its last checkpoint",
        f"{done.name} had ended before it could be cancelled: Completed",
        f"{stuck.name} did not end when it was cancelled (Cancelling); the next `posttrain ui` puts that right",
    }
    running, about = begun("running", Pending(), Running()), begun("about", Pending())
    assert set(prepare(client, POOL, {})) == {
        f"{stuck.name} crashed with the last `posttrain ui`; its next run goes on from its last checkpoint",
        f"{running.name} crashed: {UNTAKEN}",
        f"{about.name} crashed: {UNTAKEN}",
    }
    left = [client.read_flow_run(run.id).state_name for run in (stuck, running, about)]
    assert left == ["Crashed", "Crashed", "Crashed"]  # none waits for a deployment that is no more


def test_runs_that_end_with_the_ui_go_on_with_the_next(client: SyncPrefectClient, tmp_path: Path) -> None:
    """Told as crashed in between. Not those that somebody cancelled, nor those of a deployment that is paused, nor
    where a run that fell due meanwhile does the same."""
    prepare(client, "ends", {})
    what = Deployable.read(str(write_recipe(tmp_path, {})), [])

    def begun(name: str) -> FlowRun:
        made = deploy(client, what, name, When(interval_seconds=3600), pool="ends", store="a store")
        run = client.create_flow_run_from_deployment(made.id)
        for state in (Pending(), Running()):
            client.set_flow_run_state(run.id, state)
        return run

    runs = {name: begun(name) for name in ("goes-on", "cancelled", "paused", "gone")}
    client.set_flow_run_state(runs["cancelled"].id, Cancelling())

    def worker() -> bool:
        for run in runs.values():
            client.set_flow_run_state(run.id, Cancelled(), force=True)
        return False

    ending = "posttrain ui was ended; it goes on from its last checkpoint when that starts again"
    said = stop_runs(client, "ends", worker)
    assert f"{runs['goes-on'].name} was interrupted: {ending}" in said
    assert f"{runs['cancelled'].name} was cancelled; its next run goes on from its last checkpoint" in said
    found = client.read_flow_run(runs["goes-on"].id)
    assert (found.state_name, found.state_type.value) == ("Interrupted", "CRASHED")
    [row] = rows(client, ["goes-on"])
    assert row["last"]["state"] == "Interrupted"

    pause(client, ["paused"])
    remove(client, ["gone"])
    assert prepare(client, "ends", {}) == []
    lines = list(go_on(client, "ends"))
    assert f"{runs['goes-on'].name} was interrupted: it goes on from its last checkpoint" in lines
    assert f"{runs['gone'].name} was interrupted: its deployment was removed since" in lines
    states = {name: client.read_flow_run(run.id).state_name for name, run in runs.items()}
    assert states == {"goes-on": "Scheduled", "cancelled": "Cancelled", "paused": "Cancelled", "gone": "Cancelled"}
    assert list(go_on(client, "ends")) == []
    assert rows(client, ["goes-on"])[0]["next"] is not None


def test_a_check_that_no_worker_takes_up_ends(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy pool: nothing is deployed, nothing is left of the check, and one of a `deploy` that was killed goes."""
    monkeypatch.setattr("flows.prefect_check._has_worker", lambda client, pool: True)
    monkeypatch.setattr("flows.prefect_check.BEGIN_SECONDS", 0.0)
    what = Deployable.read(str(write_recipe(tmp_path, {})), [])
    said: list[str] = []
    with pytest.raises(RequestError, match="has not begun after 0 s: is it there, and has its pool room") as refused:
        all_checked(client, {"one": what, "two": what}, POOL, str(tmp_path / "store"), said.append)
    assert len(refused.value.problems) == len(said) == 1  # nobody waits once more
    of_checks = FlowFilter(name=FlowFilterName(any_=["posttrain check"]))
    assert client.read_deployments(flow_filter=of_checks) == []
    assert client.read_flow_runs(flow_filter=of_checks) == []
    client.create_deployment(client.create_flow(look), "left", work_pool_name=POOL)
    drop_checks(client)
    assert client.read_deployments(flow_filter=of_checks) == []


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """With one parameter."""
    path = write_recipe(tmp_path / "recipe", {})
    values = json.loads(path.read_text())
    values["stages"]["rows"]["with"]["limit"] = "${limit}"
    path.write_text(json.dumps({**values, "parameters": {"limit": 50}}))
    return str(path)


def test_the_next_run_is_known_before_prefect_has_made_it(client: SyncPrefectClient, recipe: str) -> None:
    """This server has no scheduler: it makes no run by itself."""
    what = Deployable.read(recipe, [])

    def due(when: When) -> str | None:
        deploy(client, what, "timed", when, pool=POOL, store="a store")
        found: str | None = rows(client, ["timed"])[0]["next"]
        return found

    assert due(When()) is None
    # 3:00 of 29 February in Tokyo, nine hours before UTC all year round, is 18:00 of the 28th
    years = (year for year in itertools.count(datetime.now(UTC).year) if calendar.isleap(year))
    eves = (datetime(year, 2, 28, 18, tzinfo=UTC) for year in years)
    eve = next(eve for eve in eves if eve > datetime.now(UTC))
    assert due(When(cron="0 3 29 2 *", timezone="Asia/Tokyo")) == eve.isoformat()
    day, before = timedelta(days=1), datetime.now(UTC).replace(microsecond=0)
    found = due(When(interval_seconds=86400))
    assert found is not None and before + day <= datetime.fromisoformat(found) <= datetime.now(UTC) + day
    assert pause(client, ["timed"])[0]["next"] is None
    assert resume(client, ["timed"])[0]["next"] == found


def test_a_schedule_that_no_worker_keeps_up_with_is_refused() -> None:
    with pytest.raises(RequestError, match=r"--interval 1: shorter than 10 s: runs would be made faster than a worker"):
        When(interval_seconds=1).schedules()
    (schedule,) = When(interval_seconds=10).schedules()
    assert schedule.schedule.interval == timedelta(seconds=10)


def test_what_a_second_deploy_changes_is_said(
    url: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", url)

    def deployed(store: str, *options: str, check: str = "--unchecked") -> str:
        command = ["deploy", recipe, "--name", "again", "--store", str(tmp_path / store), *filter(None, [check])]
        assert main([*command, *options]) == 0
        return capsys.readouterr().out

    settings = ("--set", "limit=7", "--set", "base.hidden_size=16")
    [first] = json.loads(deployed("a", "--interval", "3600", "--json", *settings))["deployments"]
    assert (first["given"], first["set"], first["changed"]) == (["limit=7"], ["base.hidden_size=16"], {})
    [second] = json.loads(deployed("b", "--json"))["deployments"]
    assert first["checked"] is second["checked"] is None  # --unchecked
    assert second["given"] == [] and second["changed"] == {
        "schedule": {"before": "every 1:00:00", "after": "on request"},
        "store": {"before": open_store(str(tmp_path / "a")).url, "after": open_store(str(tmp_path / "b")).url},
        "--set limit": {"before": "7", "after": "50"},
        "--set base.hidden_size": {"before": "16", "after": "as the recipe says"},
    }
    assert deployed("b", "--interval", "60").endswith(
        "again was deployed before; this changed:\n  schedule: on request -> every 0:01:00\n"
    )
    assert deployed("b").endswith("  schedule: every 0:01:00 -> on request (neither --cron nor --interval was given)\n")
    same = deployed("b", check="")  # no worker is there to ask
    assert "deployed before" not in same
    assert same.endswith("again: a run could begin, checked from here, for no worker of pool posttrain is there\n")


def test_a_wrong_cron_is_said_without_a_server(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert main(["deploy", recipe, "--cron", "0 3 * *", "--store", str(tmp_path / "store")]) == 2
    said = capsys.readouterr().err
    assert "--cron '0 3 * *' --timezone UTC: Invalid cron string" in said
    assert 'for example --cron "0 3 * * *": every night at 3:00' in said


def test_settings_and_stores_stand_in_the_table() -> None:
    row = {"state": "on request", "schedule": [], "next": None, "last": None, "skipped": None, "pool": POOL}
    row["recipe"] = "a.yaml"
    one = {**row, "name": "one", "store": "s3://a/store", "given": ["rows=50"], "set": ["sft.max_steps=3"]}
    two = {**row, "name": "two", "store": "/b", "given": [], "set": []}

    def shown(*listed: dict[str, Any]) -> list[str]:
        text = io.StringIO()
        Console(width=200, file=text).print(schedule_table(listed, "http://127.0.0.1:4200/api"))
        return text.getvalue().splitlines()

    alone = shown(one)
    assert any("a.yaml --set rows=50 --set sft.max_steps=3" in line for line in alone)
    assert alone[-1].strip() == "results go to the store s3://a/store"
    both = shown(one, two)
    assert [[end in line for line in both].count(True) for end in ("s3://a/store", "/b", "results go")] == [1, 1, 0]
