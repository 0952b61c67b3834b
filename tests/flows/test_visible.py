"""What models and data say, where people read it: nothing of it steers a terminal."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
from rich.console import Console

from flows import prefect_shown
from flows.prefect_report import Progress
from flows.reporting.page import environment
from flows.request import print_json
from flows.row_sources import Place
from flows.tail import follow_json
from flows.terminal import Terminal
from flows.trace import Row, Sample
from flows.trace_tables import _sample
from stages.data.dataset import read_dataset
from stages.scrubbing import ScrubbedStream
from stages.training.rollout_export import write_rollouts
from stages.training.rollout_records import Recorder
from stages.training.rollout_table import text_table
from stages.visible import visible
from tests.stages.small_models import output
from tests.training.test_rollout_records import context_in, sampled

HOSTILE = "\x1b]0;title\x07\x1b[2J\x00\x0e\x9b31m\u202eevil\x7f"
SEEN = r"\u001b]0;title\u0007\u001b[2J\u0000\u000e\u009b31m\u202eevil\u007f"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, SEEN),
        ("lines\nand\ttabs\r\nstay, é 漢 🙂 too", "lines\nand\ttabs\r\nstay, é 漢 🙂 too"),
        ("one\rover the other", r"one\u000dover the other"),
        ("\x08\x0b\x0c\x1f\x80\x9f\xa0", r"\u0008\u000b\u000c\u001f\u0080\u009f" + "\xa0"),
        ("\u2029\u202a\u202f\u2065\u2066\u2069\u206a", "\u2029\\u202a\u202f\u2065\\u2066\\u2069\u206a"),
        ("\ud800", r"\ud800"),
        (SEEN, SEEN),
    ],
)
def test_what_steers_a_terminal_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_line_of_the_table() -> None:
    """Backslashes of the text are told from those of escapes; a text that is too long loses its middle as it is seen:
    37 characters, three dots, and the last 20 of the escapes."""
    rows = [{"row": "r\x1b\n", "completion": "\\u001b\x1b\r\n\t"}, {"row": "s", "completion": "\x1b" * 30}]
    _, first, second = text_table(rows).splitlines()
    assert first == r"r\u001b\n | \\u001b\u001b\r\n\t"
    assert second == "s" + " " * 8 + " | " + r"\u001b" * 6 + "\\..." + "1b" + r"\u001b" * 3


def test_a_table_from_the_stage_to_the_eye(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal, in Prefect's log, and in its artifact; the record is what the model wrote."""
    context = context_in(tmp_path)
    recorder = Recorder(context, num_generations=1, total_steps=1)
    recorder.save(0, 0, [sampled("a", "p" + HOSTILE, [HOSTILE, "fine"], [0.5, 1.0])], [[1.0, 0.0]])
    write_rollouts(context, 1)
    (event,) = [one for one in next(follow_json(tmp_path / "job" / "events.jsonl")) if one["kind"] == "table"]

    shown = io.StringIO()
    with Terminal(console=Console(file=shown, width=400)) as terminal:
        terminal.event("rl", event)
    made: list[list[dict[str, object]]] = []
    monkeypatch.setattr(prefect_shown, "create_table_artifact", lambda rows, **_: made.append(rows))
    with caplog.at_level(logging.INFO, "task"), Progress("rl", logging.getLogger("task")) as progress:
        progress.event(event)

    lines = shown.getvalue().splitlines()
    assert lines[2].split(" | ")[2].strip() == SEEN[:37] + "..." + SEEN[-20:]
    assert all(line.isprintable() for line in lines)
    assert caplog.records[0].getMessage().splitlines() == [lines[0].removeprefix("rl: "), *lines[1:]]
    assert [(row["prompt"], row["completion"], row["reward"]) for row in made[0]] == [
        ("p" + SEEN, SEEN, 0.5),
        ("p" + SEEN, "fine", 1.0),
    ]
    assert [row["completion"] for row in read_dataset(output(context, "rollouts"))] == [HOSTILE, "fine"]


def test_errors_logs_pages_and_answers_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    shown = io.StringIO()
    with Terminal(console=Console(file=shown, width=400)) as terminal:
        terminal.event("rl", {"kind": "warning", "text": f"ValueError: {HOSTILE}"})
    assert shown.getvalue() == f"rl: ValueError: {SEEN}\n"
    log = io.StringIO()
    print(f"a\n{HOSTILE}", file=ScrubbedStream(log))
    assert log.getvalue() == f"a\n{SEEN}\n"
    page = environment().from_string("<p>{{ said }}</p>{{ short }}").render(said=HOSTILE + "<b>", short="\x1b")
    assert page == rf"<p>{SEEN}&lt;b&gt;</p>\u001b"
    print_json({"said": HOSTILE})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"said": HOSTILE} and printed.replace("\n", "").isprintable()


def test_a_sample_that_is_traced() -> None:
    """Its row, source, prompt, answer and what was expected; brackets are no markup."""
    record = {"row_id": "r", "prompt": f"p{HOSTILE}", "completion": [{"role": "assistant", "content": HOSTILE}]}
    place = Place("[/]\x1b.jsonl", "ab" * 32, 2)
    cells = _sample(Sample({**record, "answer": HOSTILE}, 0.0, Row("[/]\x1b", place, {})))
    said = [str(cell) for cell in cells]
    assert said == [r"[/]\u001b", r"[/]\u001b.jsonl row 3", "0", "p" + SEEN, SEEN, SEEN, "never"]
