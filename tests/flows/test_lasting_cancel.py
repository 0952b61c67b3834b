"""The daily work with deployed runs, at a real server with a real worker: those that fall due too early are skipped,
paused means paused, and runs are cancelled from the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.states import Cancelling

from flows.cli import main
from tests.flows.lasting_ui import Ui, running_ui  # noqa: F401
from tests.waiting import LEFT_SECONDS, until

MANY = 1_000_000
"""Steps of a training that does not end during the tests."""

pytestmark = pytest.mark.slow

Ask = Callable[..., str]
"""A command in this process, which has imported Prefect already; gives what it printed."""


def test_deployed_runs_from_day_to_day(
    ui: Ui, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", ui.url)

    def ask(*arguments: str) -> str:
        status = main([*arguments, "--store", str(ui.store_folder)])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        return shown.out

    ask("deploy", str(ui.recipe), "--interval", "10s", "--set", f"steps={MANY}", "--unchecked")
    with ui.client() as client:
        run = _skips_while_it_goes_on(ui, client)
        _paused_is_paused(ui, client, ask, run)
        _cancelled_from_the_command_line(ui, client, ask, run)
        _removed_with_its_run(ui, client, ask)


def _at_work(client: Any) -> Any:
    found = [run for run in client.read_flow_runs() if run.state_name == "Running"]
    return found[0] if found else None


def _skips_while_it_goes_on(ui: Ui, client: Any) -> Any:
    run = until(lambda: _at_work(client))
    until(lambda: (ui.decision("sft", f"steps={MANY}").step or 0) > 0)
    skipped = until(lambda: [found for found in client.read_flow_runs() if found.state_name == "Skipped"])[-1]
    run = client.read_flow_run(run.id)  # with the name that it gave itself
    assert skipped.state.type.value == "CANCELLED" and skipped.run_count == 0
    assert skipped.state.message == f"{run.name} was still in progress"
    said = f"tiny: {skipped.name}, due at {skipped.expected_start_time:%Y-%m-%d %H:%M:%S} UTC, was skipped: {run.name}"
    until(lambda: said in (ui.folder / "ui.log").read_text())
    return run


def _paused_is_paused(ui: Ui, client: Any, ask: Ask, run: Any) -> None:
    assert f"tiny: its run '{run.name}' goes on; `posttrain cancel '{run.name}'` ends it" in ask(
        "schedule", "pause", "tiny"
    )
    assert [found.name for found in client.read_flow_runs() if found.state_name in ("Scheduled", "Late")] == []
    asked = ui.ended(ui.ask(), client)
    until(lambda: client.read_flow_run(asked.id).state_name == "Skipped")
    assert client.read_flow_run(asked.id).state.message.endswith("one run at a time; ask again when it has ended")


def _cancelled_from_the_command_line(ui: Ui, client: Any, ask: Ask, run: Any) -> None:
    assert "(tiny, sft at work); no process of it is left\n" in ask("cancel", run.name)
    assert ui.processes() == []
    assert client.read_flow_run(run.id).state_name == "Cancelled"
    assert ui.tasks(run, client, 3)["sft"].name == "Cancelled"
    assert "has ended (interrupted): nothing is left to cancel" in ask("cancel", "latest")


def _removed_with_its_run(ui: Ui, client: Any, ask: Ask) -> None:
    ui.ask()
    run = until(lambda: _at_work(client))
    removed = ask("schedule", "remove", "tiny", "--cancel")
    run = client.read_flow_run(run.id)
    assert removed.startswith(f"cancelled: {run.name}\nremoved: tiny, which was paused")
    assert run.state_name == "Cancelled"
    until(lambda: ui.processes() == [], LEFT_SECONDS)


def test_a_run_that_ends_with_the_ui_goes_on_with_the_next(ui: Ui) -> None:
    """It is told in between, and the same run goes on where it was."""
    settings = (f"steps={MANY}", "sft.seed=5")
    given = [option for text in settings for option in ("--set", text)]
    assert ui.here("deploy", str(ui.recipe), *given, "--unchecked", PREFECT_API_URL=ui.url).returncode == 0
    run = ui.ask()
    until(lambda: (ui.decision("sft", *settings).step or 0) > 0)
    ui.again()
    with ui.client() as client:
        mine = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
        until(lambda: [log for log in client.read_logs(mine) if log.message.startswith("resumed at step ")])
        going = client.read_flow_run(run.id)
        assert going.state_name == "Running"
        (text,) = [text for text in ui.told.texts if going.name in text]
        assert text.startswith(f"{going.name} interrupted: posttrain ui was ended; it goes on from its last checkpoint")
        client.set_flow_run_state(run.id, Cancelling())
        assert ui.ended(run, client).state_name == "Cancelled"
        until(lambda: ui.processes() == [], LEFT_SECONDS)
