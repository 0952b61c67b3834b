"""What a stage says, as Prefect's log of its task has it."""

from __future__ import annotations

import logging

import pytest

from flows.prefect_report import Progress


def test_a_notice_reaches_the_tasks_log(caplog: pytest.LogCaptureFixture) -> None:
    text = "step 24: loss_spike: loss 7 after 1"
    with caplog.at_level(logging.INFO, "task"), Progress("sft", logging.getLogger("task")) as progress:
        progress.event({"kind": "log", "text": text})
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(logging.INFO, text)]
