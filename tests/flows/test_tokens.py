"""`posttrain tokens`: rows by hand, the counts of the stage's own ledger, and what cannot be shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from artifacts import Artifact, open_store
from artifacts.errors import RequestError, StageError
from flows.cli import main
from flows.plan import plan
from flows.recipe import Recipe
from flows.tokens import read_tokens
from stages.context import local_context
from stages.training.token_view import Reading, Wanted, seen_rows
from tests.every_stage import Done, local_run  # noqa: F401
from tests.stages.small_models import save_dataset


def read(done: Done, stage: str, *settings: str, **wanted: Any) -> Reading:
    made = plan(Recipe.load(str(done.recipe), list(settings)), open_store(str(done.store)))
    return read_tokens(made, stage, **wanted)


def texts(reading: Reading, index: int = 0) -> list[tuple[str, list[tuple[str, bool]]]]:
    parts = reading.rows[index].parts
    return [(name, [(span.text, span.learned) for span in spans]) for name, spans in parts]


def test_rows_by_hand(local_run: Done) -> None:  # noqa: F811
    """The 14th row is 1 + 3; its completion ends with the end token."""
    sft = read(local_run, "sft", limit=14)
    end = texts(sft, 13)[0][1][1][0].removeprefix("4")
    assert texts(sft, 13) == [("row", [("1+3=", False), (f"4{end}", True)])] and end
    pairs = read(local_run, "dpo", limit=14)
    assert texts(pairs, 13) == [
        ("prompt", [("1+3=", False)]),
        ("chosen", [(f"4{end}", True)]),
        ("rejected", [(f"5{end}", True)]),
    ]
    assert texts(read(local_run, "kto", limit=14), 13) == [
        ("prompt", [("1+3=", False)]),
        ("desirable", [(f"4{end}", True)]),
        ("prompt", [("1+3=", False)]),
        ("undesirable", [(f"5{end}", True)]),
    ]
    for stage in ("drawn", "grpo", "ppo", "online", "contest", "regressed"):
        assert texts(read(local_run, stage, limit=14), 13) == [("prompt", [("1+3=", False)])]
    steps = read(local_run, "judge_of_steps", limit=14)  # each step is judged at the separator after it
    assert texts(steps, 13) == [
        ("right", [("1+3=4", False), ("=", True)]),
        ("wrong", [("5", False), ("=", True)]),
    ]


@pytest.mark.parametrize("stage", ["sft", "dpo", "judge", "adapter"])
def test_all_rows_together_are_what_the_stage_counted(local_run: Done, stage: str) -> None:  # noqa: F811
    entry = local_run.payload["stages"][stage]["outputs"]
    model = open_store(str(local_run.store)).materialize(Artifact.from_json(next(iter(entry.values()))))
    ledger = json.loads((model / "ledger.json").read_text())
    reading = read(local_run, stage, limit=0)
    assert (len(reading.rows), reading.total) == (ledger["input"], 120)
    assert sum(row.count() for row in reading.rows) == ledger["tokens"]["states"]["used"]


def test_settings_show_what_they_would_do(local_run: Done) -> None:  # noqa: F811
    whole = read(local_run, "sft", "sft.completion_only_loss=false", limit=14)
    assert [learned for _, learned in texts(whole, 13)[0][1]] == [False, True]  # nothing predicts the first token
    assert whole.rows[13].count(learned=False) == 1
    short = read(local_run, "sft", "sft.max_length=5", limit=14)
    assert short.rows[13].state == "truncated by 1 tokens" and texts(short, 13)[0][1][1] == ("4", True)
    none = read(local_run, "sft", "sft.max_length=4", limit=14).rows[13]
    assert (none.parts, none.state) == ((), "masked")


def test_what_an_evaluation_reads(local_run: Done, tmp_path: Path) -> None:  # noqa: F811
    """Prompts where answers are judged, else the rows with what counts in the loss, or pairs."""
    assert texts(read(local_run, "scores", limit=14), 13) == [("prompt", [("1+3=", False)])]
    for rows, like, config in (("rows", "sft", {}), ("pairs", "dpo", {}), ("rows", "grpo", {"tasks": ["reward"]})):
        inputs = {"model": made(local_run, "sft"), "dataset": made(local_run, rows)}
        fits = {"max_completion_length": 6, **config}
        context = local_context("evaluate", fits, folder=tmp_path / like, inputs=inputs)
        evaluated = seen_rows(context, Wanted("dataset", None, 14))
        assert texts(evaluated, 13) == texts(read(local_run, like, limit=14), 13)


def test_what_an_evaluation_reads_is_by_the_type_of_its_rows(local_run: Done, tmp_path: Path) -> None:  # noqa: F811
    """Prompts where no row has a loss, and the loss where rewards are given that such rows have no prompts for."""
    pieces = {"prompt": "1+3=", "completion": "4", "label": True}

    def parts(kind: str, columns: tuple[str, ...], rewards: Sequence[str] = (), tasks: Sequence[str] = ()) -> list[str]:
        folder = tmp_path / f"{kind}-{len(rewards)}-{len(tasks)}"
        row = {column: pieces.get(column, "1+3=4") for column in columns}
        save_dataset(folder / "rows", kind, [row])
        inputs = {"model": made(local_run, "sft"), "dataset": folder / "rows"}
        fits = {"max_completion_length": 6, "rewards": [*rewards], "tasks": [*tasks]}
        context = local_context("evaluate", fits, folder=folder, inputs=inputs)
        return [name for name, _ in texts(seen_rows(context, Wanted("dataset", None, 1)))]

    assert parts("prompt", ("prompt",)) == ["prompt"]
    assert parts("unpaired_preference", ("prompt", "completion", "label")) == ["prompt"]
    assert parts("language_modeling", ("text",), rewards=["exact_match"]) == ["row"]
    with pytest.raises(
        StageError, match=r"task loss: it takes language_modeling or .*, this dataset is of type prompt"
    ):
        parts("prompt", ("prompt",), tasks=["loss"])


def made(done: Done, stage: str) -> Path:
    """The folder of its first output."""
    outputs = done.payload["stages"][stage]["outputs"]
    return open_store(str(done.store)).materialize(Artifact.from_json(next(iter(outputs.values()))))


def test_what_cannot_be_shown(local_run: Done, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(RequestError, match=r"merged \(merge_adapter\) has no rows .* those that have: sft, drawn, dpo"):
        read(local_run, "merged")
    with pytest.raises(RequestError, match="get what its tools add when it runs"):
        read(local_run, "grpo", "grpo.tools=[task.py:length]")
    with pytest.raises(RequestError, match="has no stage 'sfd'; did you mean 'sft'"):
        read(local_run, "sfd")
    with pytest.raises(RequestError, match="stage sft has no input eval_dataset wired in; it has: model, dataset"):
        read(local_run, "sft", input="eval_dataset")
    with pytest.raises(RequestError, match="no row of input dataset has an id that begins with 'nope'"):
        read(local_run, "sft", row="nope")
    elsewhere = Done(local_run.recipe, tmp_path / "store", {})
    with pytest.raises(RequestError, match="input model of stage sft comes from stage base, whose result is not there"):
        read(elsewhere, "sft")


def test_the_command_marks_what_is_learned(local_run: Done, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    row = read(local_run, "sft", limit=14).rows[13].row_id
    command = ["tokens", str(local_run.recipe), "sft", "--row", row, "--store", str(local_run.store)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "1+3=«4" in shown and "1 of 120 rows of input dataset (prompt_completion): 6 tokens, of which 2" in shown
    assert main([*command, "--ids"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    assert [line[3:] for line in lines[:5]] == [["1"], ["+"], ["3"], ["="], ["4", "yes"]]
    assert main([*command, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["rows"]
    assert told["parts"][0]["learned"] == [False] * 4 + [True] * 2 and len(told["parts"][0]["token_ids"]) == 6
