"""`posttrain cancel`: real runs in processes of their own, with a Prefect at hand and without one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import flow
from prefect.exceptions import CancelledRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Cancelling

import flows.prefect_flow
from artifacts import Store
from artifacts.errors import RequestError
from artifacts.owner import machine, owner_tag, start_time
from flows.cancel import cancel
from flows.cancelled import Answer, in_words
from flows.cli import main
from flows.left import Left
from flows.listener import Silence
from flows.pipeline import run_pipeline
from flows.prefect_api import api as api_at
from flows.prefect_cancel import PrefectPages
from flows.prefect_flow import posttrain
from flows.told import DEAF_SECONDS, told_once
from tests.flows.pipeline_command import Command
from tests.flows.pipeline_stages import World
from tests.flows.prefect_server import Api, ended
from tests.waiting import LIMIT_SECONDS, until

OTHER = "otherboot.4026531836-17-123"
"""A process of another machine."""


HERE = Path(__file__).parent


def at_work(world: World) -> bool:
    """Whether the newest run is in its stage `two`."""
    runs = world.store.runs()
    return bool(runs) and world.store.read_run(runs[0])["stages"]["two"]["state"] == "running"


class Going:
    """A run in a process of its own, whose stage `two` waits for a file that never comes; it has begun."""

    def __init__(self, world: World, home: Path, api: str | None) -> None:
        self.store = world.store
        self.process = Command(world.folder, home, "two.until=never", api=api).process
        until(lambda: at_work(world))
        self.id = self.store.runs()[0]
        self.processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def end(self) -> None:
        """Without a signal from here."""
        self.process.communicate(timeout=LIMIT_SECONDS)
        assert all(ended(process) for process in self.processes)

    def __enter__(self) -> Going:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def test_a_run_of_a_terminal_is_cancelled_and_its_pages_say_so(
    world: World, api: Api, prefect_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = f"{world.folder / 'store'}"
    with Going(world, prefect_home, api.url) as going:
        shown = api.flow_run(going.id)
        assert main(["cancel", going.id[:19], "--store", store]) == 0  # its date, time and a digit are enough
        assert not psutil.pid_exists(going.process.pid) or ended(psutil.Process(going.process.pid))
        going.end()
    payload = world.store.read_run(going.id)
    left = Left.of(world.store, payload)
    assert "one" in left.done and left.begun == {"two": ""} and "three" in left.waiting
    assert capsys.readouterr().out == (
        f"cancelled: run {going.id} (small, two at work); no process of it is left\n"
        f"{left.in_words()}\n"
        "to go on, give the same command again; the next run of its deployment, if any, goes on too\n"
    )
    assert api.read(shown.id).name == "Cancelled"
    assert api.task_states(going.id, 2)["two"].name == "Cancelled"
    assert (payload["state"], payload["stages"]["two"]["state"]) == ("interrupted", "interrupted")
    assert main(["cancel", "latest", "--store", store]) == 0
    assert capsys.readouterr().out == f"run {going.id} has ended (interrupted): nothing is left to cancel\n"
    wrong = going.id[:-1] + ("0" if going.id[-1] != "0" else "1")
    assert main(["cancel", wrong, "--store", store]) == 2
    assert f"there is no run {wrong!r} in {world.store.url}; did you mean {going.id!r}?" in capsys.readouterr().err
    assert main(["cancel", " ", "--store", store]) == 2


def test_cancel_in_the_pages_ends_a_run_of_a_terminal(world: World, api: Api, prefect_home: Path) -> None:
    """They note it in Prefect, where no worker reads it."""
    with Going(world, prefect_home, api.url) as going:
        shown = api.flow_run(going.id)
        with api_at(api.url) as client:
            client.set_flow_run_state(shown.id, Cancelling())
        going.end()
    state = api.read(shown.id)
    assert (state.name, state.message) == ("Cancelled", "cancelled in the pages; run again to go on")
    assert api.task_states(going.id, 2)["two"].name == "Cancelled"
    payload = world.store.read_run(going.id)
    assert (payload["state"], payload["stages"]["two"]["state"]) == ("interrupted", "interrupted")


def test_cancel_when_all_is_done_is_no_end_of_another_kind(
    world: World, api: Api, prefect_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the run looks once more before its end or not, Prefect leaves what was told to end without one."""
    for poll_seconds in (0.05, 60.0):
        monkeypatch.setattr("flows.prefect_told.POLL_SECONDS", poll_seconds)
        late = Late(api, "three")
        payload = run_pipeline(world.plan(f"one.text=x{poll_seconds}"), late)
        assert payload["state"] == "ok" and payload["stages"]["three"]["state"] == "ran"
        assert api.read(late.told).name == "Completed"


class Late(Silence):
    """Whose run is cancelled in the pages as a stage ends."""

    def __init__(self, api: Api, stage: str) -> None:
        self.api, self.stage = api, stage

    def ended(self, name: str, entry: Any) -> None:
        if name == self.stage:
            with api_at(self.api.url) as client:
                running = [run for run in client.read_flow_runs() if run.infrastructure_pid == owner_tag()]
                (self.told,) = [run.id for run in running if run.state_name == "Running"]
                client.set_flow_run_state(self.told, Cancelling())
            time.sleep(0.5)


def test_who_is_told_again_ends_as_well_as_before(world: World, api: Api, prefect_home: Path) -> None:
    with Going(world, prefect_home, api.url) as going:
        enough = time.monotonic() + DEAF_SECONDS / 2  # who asks after that is heard again
        while going.process.poll() is None and time.monotonic() < enough:
            going.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        going.end()
    payload = world.store.read_run(going.id)
    assert (payload["state"], payload["stages"]["two"]["state"]) == ("interrupted", "interrupted")


def test_a_signal_is_heard_once_and_after_a_while_again(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    now = 100.0
    monkeypatch.setattr("flows.told.time.monotonic", lambda: now)
    try:
        with told_once(deaf_seconds=20):
            for now, times in ((100.0, 1), (101.0, 1), (120.0, 1), (120.5, 2), (130.0, 2)):
                os.kill(os.getpid(), signal.SIGTERM)
                assert len(heard) == times, now
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(heard) == 3
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_prefect_the_process_is_told(world: World, tmp_path: Path, prefect_home: Path) -> None:
    """It brings a server of its own, which nobody else can ask; `kill -TERM` and this are one."""
    with Going(world, prefect_home, None) as going:
        said: list[str] = []
        answer = cancel(world.store, going.id[-6:], None, said.append)
        going.end()
    assert answer == Answer(going.id, "small", "cancelled", ("two",), process=going.process.pid)
    assert said == [f"run {going.id} was told to end; waiting until nothing of it is left"]
    assert json.loads(json.dumps(answer.to_json()))["stages"] == ["two"]


def test_a_suspended_run_goes_on_to_its_end(world: World, api: Api, prefect_home: Path) -> None:
    """Ctrl-Z stops a process, and a stopped process hears nothing."""
    with Going(world, prefect_home, api.url) as going:
        going.process.send_signal(signal.SIGSTOP)
        until(lambda: going.processes[0].status() == psutil.STATUS_STOPPED)
        assert cancel(world.store, "latest", None, lambda text: None).state == "cancelled"
        going.end()


DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"


def test_one_that_does_not_end_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE) as deaf:
        assert deaf.stdout is not None and deaf.stdout.readline()
        tag = f"{machine()}-{deaf.pid}-{start_time(deaf.pid)}"
        monkeypatch.setattr("artifacts.running.owner_tag", lambda: tag)
        run = elsewhere(world.store, "")
        with pytest.raises(RequestError, match=rf"has not: still there: process {deaf.pid}; `kill -9` ends"):
            cancel(world.store, run, None, lambda text: None, wait_seconds=0.5)
        deaf.kill()


def elsewhere(store: Store, flow_run: str) -> str:
    """A run that this process says it does."""
    run = "20261129-070809-abcdef"
    store.write_running(run, {"run": run, "recipe": "small", "stages": {}, "flow_run": flow_run})
    return run


def test_a_run_of_another_machine_needs_its_prefect(world: World, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("artifacts.running.owner_tag", lambda: OTHER)
    run = elsewhere(world.store, str(uuid.uuid4()))
    for pages in (None, "asked"):
        with api_at(api.url) as client, pytest.raises(RequestError) as refused:
            cancel(world.store, run, PrefectPages(client) if pages else None, lambda text: None)
        assert "goes on on another machine, or in a container of its own, and no Prefect at hand knows it" in str(
            refused.value
        )
        assert "set PREFECT_API_URL" in str(refused.value)
    by_hand = api.running(OTHER)
    run = elsewhere(world.store, str(by_hand))
    with api_at(api.url) as client:
        with pytest.raises(RequestError, match=r"has not: elsewhere, started by hand on another machine, has not said"):
            cancel(world.store, run, PrefectPages(client), lambda text: None, wait_seconds=0.5)
        assert api.read(by_hand).name == "Cancelling"

        def ends(text: str) -> None:  # as it does once it has looked
            client.set_flow_run_state(by_hand, Cancelled(message="there"), force=True)

        assert cancel(world.store, run, PrefectPages(client), ends).state == "cancelled"
    assert api.read(by_hand).message == "there"


def test_a_trial_ends_with_its_sweep(world: World, api: Api, prefect_home: Path) -> None:
    """They are one process, and that is said."""
    sweep = ["sweep", world.file(), "--over", "two.text=x,xx", "--set", "two.until=never", "--metric", "three"]
    command = [sys.executable, str(HERE / "sweep_process.py"), *sweep, "--store", world.store.url]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "PREFECT_API_URL": api.url}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            until(lambda: at_work(world))
            with api_at(api.url) as client:
                answer = cancel(world.store, "latest", PrefectPages(client), lambda text: None)
                assert answer.prefect is not None and "two.text=x " in answer.prefect
            process.communicate(timeout=LIMIT_SECONDS)
        finally:
            process.kill()
    assert (answer.state, answer.stages, answer.process) == ("cancelled", ("two",), process.pid)
    assert answer.sweep is not None and world.store.runs() == [answer.run]  # the other one never began
    assert f"its sweep {answer.sweep} ended with it, for both are one process; to go on, give" in in_words(answer)[-1]


def test_a_sweep_is_cancelled_by_its_name(world: World, api: Api) -> None:
    """With the trials that are at work beside each other; Prefect knows how it ended."""
    over = ["--over", "two.text=x,xx", "--set", "two.until=never", "--metric", "three", "--parallel", "2"]
    sweep = ["sweep", world.file(), *over, "--name", "pair", "--store", world.store.url]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "PREFECT_API_URL": api.url}
    command = [sys.executable, str(HERE / "sweep_process.py"), *sweep]

    def states() -> list[str]:
        return [world.store.read_run(run)["stages"]["two"]["state"] for run in world.store.runs()]

    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            until(lambda: states() == ["running", "running"], 60)
            with api_at(api.url) as client:
                (shown,) = [run for run in client.read_flow_runs() if run.name == "sweep pair" and alive(run)]
                pages = PrefectPages(client)
                with pytest.raises(RequestError, match=r"no run 'pari' in .*; did you mean 'pair'"):
                    cancel(world.store, "pari", pages, lambda text: None)
                answer = cancel(world.store, "pair", pages, lambda text: None)
                again = cancel(world.store, "pair", pages, lambda text: None)
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert (answer.state, answer.sweep, answer.process) == ("cancelled", "pair", process.pid)
    assert states() == ["interrupted", "interrupted"]
    assert api.read(shown.id).name == "Cancelled"
    assert in_words(again)[0].startswith("no trial of sweep pair is at work (its last run ")


def test_cancel_in_the_pages_ends_a_sweep(world: World, api: Api, prefect_home: Path) -> None:
    """It ends what runs and begins no other trial; who is told by signals meanwhile enters its ends all the same."""
    sweep = ["sweep", world.file(), "--over", "two.text=x,xx", "--set", "two.until=never", "--metric", "three"]
    command = [sys.executable, str(HERE / "sweep_process.py"), *sweep, "--store", world.store.url]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "PREFECT_API_URL": api.url}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            until(lambda: at_work(world))
            with api_at(api.url) as client:
                (shown,) = [run for run in client.read_flow_runs() if run.name.startswith("sweep ") and alive(run)]
                client.set_flow_run_state(shown.id, Cancelling())
            process.communicate(timeout=LIMIT_SECONDS)
        finally:
            process.kill()
    (run,) = world.store.runs()
    assert world.store.read_run(run)["state"] == "interrupted"
    assert api.read(shown.id).name == "Cancelled"


def alive(run: Any) -> bool:
    """Whether it has not ended."""
    return not run.state.is_final()


def test_cancel_in_the_pages_ends_the_run_in_a_program_of_ones_own(
    world: World, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flow as it is, or in another one, which goes on."""
    monkeypatch.setattr("flows.prefect_told.POLL_SECONDS", 0.05)

    late = Late(api, "one")

    @flow
    def mine() -> str:
        return str(run_pipeline(world.plan("two.until=never"), late)["state"])

    with temporary_settings({PREFECT_API_URL: api.url}):
        assert mine() == "interrupted"
    assert api.read(late.told).name == "Cancelled"
    publish = flows.prefect_flow.publish_stage

    def published(run: Any, name: str) -> None:
        publish(run, name)
        late.ended(name, None)

    monkeypatch.setattr("flows.prefect_flow.publish_stage", published)
    with temporary_settings({PREFECT_API_URL: api.url}), pytest.raises(CancelledRun):
        posttrain(world.file(), set=["two.until=never", "one.text=other"], store=world.store.url)
    assert api.read(late.told).name == "Cancelled"
