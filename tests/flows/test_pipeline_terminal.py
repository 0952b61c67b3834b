"""What a person sees of a run: lines from events on a clock that the test sets, and the closing table."""

from __future__ import annotations

import io
import re
import sys
import types

import pytest
from rich.console import Console

from artifacts import Record
from flows.closing import format_metric, main_metric
from flows.console import console_of
from flows.decision import Decision
from flows.terminal import StageLine, Terminal, clock
from tests.flows.pipeline_stages import MAKE

ENTRY = {
    "uses": "make",
    "state": "ran",
    "seconds": 61.0,
    "reason": "first run",
    "outputs": {"dataset": {"kind": "dataset", "id": "sha256:" + "ab" * 32}},
    "metrics": {"length": 3},
    "error": None,
}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.stage.STAGES", ("make",))
    module = types.ModuleType("stages.make")
    module.STAGE = MAKE
    monkeypatch.setitem(sys.modules, "stages.make", module)


def progress(step: int, **values: float) -> dict:
    return {"kind": "progress", "step": step, "total": 100, "unit": "step", "values": values}


def test_speed_and_time_left_count_from_where_this_process_began() -> None:
    line = StageLine("sft", started=0.0)
    line.take({"kind": "phase", "text": "loading the model"}, 5.0)
    assert line.describe() == "loading the model"
    line.take(progress(40), 10.0)  # resumed at step 40: those steps were not done now
    assert line.describe() == "40/100 steps"
    line.take(progress(50, loss=1.23456), 20.0)
    # 10 steps in 10 s; 50 steps are left
    assert line.describe() == "50/100 steps, 1 steps/s, loss 1.235, 0:50 left"
    line.take(progress(60, reward=0.5, tokens_per_second=1234.6), 30.0)
    assert line.describe() == "60/100 steps, 1,235 tokens/s, reward 0.5, 0:40 left"
    line.take(progress(100), 70.0)
    assert line.describe() == "100/100 steps, 1 steps/s"
    line.take(progress(1), 80.0)  # a second loop of the stage counts anew
    assert line.describe() == "1/100 steps"


@pytest.mark.parametrize(("seconds", "shown"), [(7, "0:07"), (754, "12:34"), (3723, "1:02:03"), (59.6, "1:00")])
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_plain_lines_now_and_then(make: None) -> None:
    text, now = io.StringIO(), Clock()
    with Terminal(console=Console(file=text, width=200), monotonic=now) as terminal:
        terminal.started("sft", "with.beta: 0.1 -> 0.2")
        for second in range(1, 26):
            now.now = 100.0 + second
            terminal.event("sft", progress(second))
        terminal.event("sft", {"kind": "warning", "text": "WARNING [bold] is no markup"})
        terminal.ended("sft", ENTRY)
    # one at the start, one after 10 s and one after 20, warnings at once, one at the end
    assert text.getvalue().splitlines() == [
        "sft: running: with.beta: 0.1 -> 0.2",
        "sft: 10/100 steps, 1 steps/s, 1:30 left",
        "sft: 20/100 steps, 1 steps/s, 1:20 left",
        "sft: WARNING [bold] is no markup",
        "sft: ran in 1:01, length 3",
    ]


def test_failures_and_skips_say_why() -> None:
    text = io.StringIO()
    with Terminal(console=Console(file=text, width=200)) as terminal:
        terminal.ended("a", {**ENTRY, "state": "failed", "error": "row 3: no text"})
        terminal.ended("b", {**ENTRY, "state": "skipped", "reason": "a failed"})
        terminal.ended("c", {**ENTRY, "state": "cached", "reason": "done by run r"})
    assert text.getvalue().splitlines() == [
        "a: failed: row 3: no text",
        "b: skipped: a failed",
        "c: cached: done by run r",
    ]


def test_closing_table(make: None) -> None:
    text = io.StringIO()
    failed = {**ENTRY, "state": "failed", "seconds": 0.2, "error": "row 3\nmore", "outputs": {}, "metrics": {}}
    resumed = {**ENTRY, "resumed_from": 1200, "earlier_seconds": 20.25}
    stages = {"a": ENTRY, "b": failed, "c": resumed, "d": {**resumed, "earlier_seconds": None}}
    payload = {"recipe": "r", "run": "1", "state": "failed", "stages": stages}
    Terminal(console=Console(file=text, width=200)).finished(payload)
    rows = [re.split(" {2,}", line.strip()) for line in text.getvalue().splitlines()[3:]]
    assert rows == [
        ["a", "ran", "61.0 s", "length 3", "abababababab"],
        ["b", "failed", "0.2 s", "its error is above"],
        ["c", "ran, resumed at step 1,200", "61.0 s, 81.2 s in all", "length 3", "abababababab"],
        ["d", "ran, resumed at step 1,200", "61.0 s", "length 3", "abababababab"],
    ]


def test_an_error_is_said_once_and_in_full(make: None) -> None:
    text = io.StringIO()
    failed = {**ENTRY, "state": "failed", "error": "row 3\nhas no prompt", "outputs": {}, "metrics": {}}
    with Terminal(console=Console(file=text, width=200)) as terminal:
        terminal.ended("b", failed)
        terminal.finished({"recipe": "r", "run": "1", "state": "failed", "stages": {"b": failed}})
    assert text.getvalue().count("row 3") == text.getvalue().count("has no prompt") == 1


def test_a_resumed_stage_says_what_it_took_in_all(make: None) -> None:
    text = io.StringIO()
    with Terminal(console=Console(file=text, width=200)) as terminal:
        terminal.ended("a", {**ENTRY, "resumed_from": 40, "earlier_seconds": 20.0})
    assert text.getvalue() == "a: ran in 1:01, 1:21 in all, length 3\n"


def test_a_terminal_is_redrawn_in_place(make: None) -> None:
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=True, color_system=None)
    with Terminal(console=console) as terminal:
        terminal.started("sft", "first run")
        terminal.event("sft", progress(40, loss=2.0))
        terminal.event("sft", {"kind": "log", "text": "a line above"})
        terminal.finished({"recipe": "r", "run": "1", "state": "ok", "stages": {"sft": ENTRY}})
    assert "40/100 steps" in text.getvalue() and "sft: a line above" in text.getvalue()
    assert "\x1b[2K" in text.getvalue()  # a line was cleared to be drawn again


def test_in_a_narrow_terminal_a_stage_stays_one_line(make: None) -> None:
    """What does not fit are the last numbers, not how far it is and how long it takes."""
    clock_of, text = iter(range(0, 1000, 10)), io.StringIO()
    console = Console(file=text, width=64, force_terminal=True, color_system=None)
    with Terminal(console=console, monotonic=lambda: float(next(clock_of))) as terminal:
        terminal.started("eval_reward_pairs", "first run")
        for step in (40, 50):
            terminal.event("eval_reward_pairs", progress(step, loss=0.123456789, tokens_per_second=12345.0))
        terminal.finished({"recipe": "r", "run": "1", "state": "ok", "stages": {"sft": ENTRY}})
    drawn = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", text.getvalue()))
    told = [line.rstrip() for line in drawn if "/100 steps" in line]
    assert told and re.fullmatch(r"eval_reward_pairs \S+ +\d+:\d\d +50/100 steps 0:\d\d left \S+.*…", told[-1])
    assert not any(line.startswith(" ") for line in drawn[: drawn.index(told[-1])] if line.strip())  # nor goes on below


def test_metrics_with_intervals() -> None:
    measured = {"accuracy": 0.71234, "accuracy/low": 0.668, "accuracy/high": 0.752}
    assert main_metric({"uses": "evaluate", "metrics": measured}) == "accuracy 0.7123 [0.668, 0.752]"
    assert main_metric({"uses": "evaluate", "metrics": {"loss": 2.5}}) == "loss 2.5"
    assert main_metric({"uses": "evaluate", "metrics": {}}) == ""
    held_out = {"rewards/accuracies": 1.0, "eval/rewards/accuracies": 0.625}
    assert main_metric({"uses": "preference", "metrics": held_out}) == "eval/rewards/accuracies 0.625"
    assert format_metric(3) == "3"


def test_stages_that_are_not_selected_are_named_once(make: None) -> None:
    text = io.StringIO()
    reason = "not selected by --until two"
    taken = Decision("zero", "skipped", (f"{reason}; its result is taken", "done by run r"), record=Record("make", "f"))
    plan = {
        "zero": taken,
        "two": Decision("two", "run", ("first run",)),
        "three": Decision("three", "skipped", (reason,)),
        "four": Decision("four", "skipped", (reason,)),
    }
    skipped = {**ENTRY, "state": "skipped", "reason": reason, "outputs": {}}
    stages = {"zero": {**ENTRY, "state": "skipped"}, "two": ENTRY, "three": skipped, "four": skipped}
    with Terminal(console=Console(file=text, width=200)) as terminal:
        terminal.planned(plan)
        for name in ("zero", "three", "four"):
            terminal.ended(name, stages[name])
        terminal.finished({"recipe": "r", "run": "1", "state": "ok", "stages": stages})
    said = text.getvalue()
    assert [line.rstrip() for line in said.splitlines()[:3]] == [
        "zero  skipped  not selected by --until two; its result is taken; done by run r",
        "two   run      first run",
        "not selected by --until two: three, four",
    ]
    assert said.count("three") == said.count("four") == 1
    rows = said.split("─\n")[-1]
    assert [line.split()[0] for line in rows.splitlines() if line.strip()] == ["zero", "two"]


def test_a_terminal_of_ascii_gets_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    console_of(width_of_files=80).print("small · run-1 · a long nam…")
    assert written.getvalue() == b"small ? run-1 ? a long nam?\n"
