"""What a stage says, as Prefect's log of its task has it."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from flows import prefect_report, prefect_shown
from flows.prefect_report import Progress


def test_a_notice_reaches_the_tasks_log(caplog: pytest.LogCaptureFixture) -> None:
    text = "step 24: loss_spike: loss 7 after 1"
    with caplog.at_level(logging.INFO, "task"), Progress("sft", logging.getLogger("task")) as progress:
        progress.event({"kind": "log", "text": text})
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(logging.INFO, text)]


def test_a_table_is_in_the_log_and_an_artifact(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each later table of a stage replaces it under one key; one that Prefect does not take stops nothing."""
    made: list[tuple[str, str, object]] = []

    def create(rows: object, *, key: str, description: str) -> None:
        made.append((key, description, rows))
        if len(made) == 2:
            raise RuntimeError("full")

    monkeypatch.setattr(prefect_shown, "create_table_artifact", create)
    rows = [{"completion": "46", "reward": 1.0}]
    event = {"kind": "table", "name": "completions", "title": "step 5: completions", "rows": rows, "text": "as text"}
    with caplog.at_level(logging.INFO, "task"), Progress("my GRPO", logging.getLogger("task")) as progress:
        progress.event(event)
        progress.event(event)
    assert made == [("completions-my-grpo", "my GRPO: step 5: completions", rows)] * 2
    said = [record.getMessage() for record in caplog.records]
    assert said == ["as text", "as text", "Prefect did not take what the run wanted to show: full"]


def test_a_server_that_is_away_holds_nobody_up_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event every three seconds; each update waits for 20 s in vain, so the next one is 200 s later."""
    clock = [1000.0]
    tried: list[float] = []

    def create(percent: float, key: str, description: str) -> None:
        tried.append(clock[0])
        clock[0] += 20
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(prefect_report, "create_progress_artifact", create)
    monkeypatch.setattr(prefect_report, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with Progress("sft", logging.getLogger("task")) as progress:
        while clock[0] < 1500:
            progress.event({"kind": "progress", "step": 1, "total": 9, "unit": "step", "values": {}})
            clock[0] += 3
    assert tried == [1000, 1221, 1442]  # the first event after 1020 + 200, one every 3 s from 1023 on
