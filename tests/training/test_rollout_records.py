"""What is kept of rollouts: rows by hand, the same bytes again, a table for people, and a run that was killed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from accelerate.state import AcceleratorState

from artifacts import Shards
from stages.context import Context, local_context
from stages.data.dataset import read_dataset
from stages.data.tokenize import TokenizedPrompt
from stages.rollouts.requests import Completion
from stages.rollouts.rewards import RewardSet
from stages.training import rollout_export, rollout_records
from stages.training.checkpoint import Saver
from stages.training.generation import Sampling
from stages.training.loop import Trainer
from stages.training.rollout_export import write_rollouts
from stages.training.rollout_metrics import rollout_metrics
from stages.training.rollout_records import Recorder, Sampled, to_parquet
from stages.training.rollout_table import text_table
from tests.stages.interruptions import killed_in
from tests.stages.small_models import output, read_lines, save_dataset, save_model

Prompt = Any


def sampled(row_id: str, prompt: Prompt, texts: Sequence[str], totals: Sequence[float | None]) -> Sampled:
    """Completion i is the tokens (5, ..., 5, i), one a character; its log-probabilities are -1, -2, ..."""
    completions = [
        Completion([5] * (len(text) - 1) + [i], [-1.0 - t for t in range(len(text))], finished=i == 0)
        for i, text in enumerate(texts)
    ]
    rewards = {"right": [None] * len(texts), "length": list(totals)}
    return Sampled(TokenizedPrompt(row_id, [7, 8], {"prompt": prompt}), completions, list(texts), rewards, list(totals))


def context_in(folder: Path) -> Context:
    settings = {"rewards": ["exact_match"], "log_completions_steps": 2}
    return local_context("rl", settings, folder=folder, inputs={})


def record(folder: Path, prompts: Sequence[Prompt]) -> Context:
    """Two generations of two steps each; in the second, one prompt twice."""
    context = context_in(folder)
    recorder = Recorder(context, num_generations=2, total_steps=4)
    recorder.save(0, 0, [sampled("a", prompts[0], ["xy", "z"], [0.5, None])], [[1.0, 0.0]])
    again = [sampled("b", prompts[1], ["x", "yy"], [2.0, 3.0]), sampled("b", prompts[1], ["x", "z"], [4.0, 5.0])]
    recorder.save(1, 2, again, [[-1.0, 1.0], [-0.5, 0.5]])
    write_rollouts(context, 2)
    return context


def test_samples_are_json_where_nobody_knows_a_probability(tmp_path: Path) -> None:
    """Of completions of a form by vLLM, whose probability among all tokens is NaN."""
    entry = sampled("a", "p", ["xy", "z"], [0.5, 1.0])
    held = [replace(one, free_logprobs=[math.nan] * len(one.token_ids)) for one in entry.completions]
    recorder = Recorder(context_in(tmp_path), num_generations=2, total_steps=4)
    recorder.save(0, 0, [replace(entry, completions=held)], [[1.0, 0.0]])
    json.dumps(recorder.samples, allow_nan=False)
    assert [row["token_ids"] for row in recorder.samples] == [[5, 0], [1]]
    assert [len(row["free_logprobs"]) for row in recorder.records(1)] == [2, 1]


def test_a_row_a_completion(tmp_path: Path) -> None:
    rows = list(read_dataset(output(record(tmp_path, ["p", "q"]), "rollouts")))
    assert rows[:2] == [
        {
            "row_id": "a/1/0",
            "prompt_row_id": "a",
            "prompt": "p",
            "completion": "xy",
            "prompt_ids": [7, 8],
            "token_ids": [5, 0],
            "logprobs": [-1.0, -2.0],
            "finished": True,
            "reward": 0.5,
            "reward_right": None,
            "reward_length": 0.5,
            "advantage": 1.0,
            "step": 1,
            "weight_version": 0,
            "group": 0,
        },
        {
            "row_id": "a/1/1",
            "prompt_row_id": "a",
            "prompt": "p",
            "completion": "z",
            "prompt_ids": [7, 8],
            "token_ids": [1],
            "logprobs": [-1.0],
            "finished": False,
            "reward": None,
            "reward_right": None,
            "reward_length": None,
            "advantage": 0.0,
            "step": 1,
            "weight_version": 0,
            "group": 0,
        },
    ]
    assert [(row["row_id"], row["group"], row["weight_version"], row["reward"]) for row in rows[2:]] == [
        ("b/3/0", 0, 2, 2.0),
        ("b/3/1", 0, 2, 3.0),
        ("b/3/2", 1, 2, 4.0),
        ("b/3/3", 1, 2, 5.0),
    ]


def test_messages_keep_their_fields(tmp_path: Path) -> None:
    """A call in one generation's prompts only: the file has one schema, and every row is as it was."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    plain = [{"role": "user", "content": "p"}]
    calling = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "name": "f"},
    ]
    rows = list(read_dataset(output(record(tmp_path, [plain, calling]), "rollouts")))
    assert [row["prompt"] for row in rows] == [plain] * 2 + [calling] * 4
    assert [row["completion"][0] for row in rows[:2]] == [
        {"role": "assistant", "content": text} for text in ("xy", "z")
    ]


def test_files_end_with_a_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After two rows or more; read together they are the rows of one file, and equal runs are equal bytes."""
    whole = output(record(tmp_path / "whole", ["p", "q"]), "rollouts")
    monkeypatch.setattr(rollout_export, "ROWS_PER_FILE", 2)
    parts = output(record(tmp_path / "parts", ["p", "q"]), "rollouts")
    again = output(record(tmp_path / "again", ["p", "q"]), "rollouts")
    assert [path.name for path in sorted(whole.glob("*.parquet"))] == ["data-00000.parquet"]
    names = ["data-00000.parquet", "data-00001.parquet"]
    assert [path.name for path in sorted(parts.glob("*.parquet"))] == names
    assert [pyarrow.parquet.read_metadata(parts / name).num_rows for name in names] == [2, 4]
    assert list(read_dataset(parts)) == list(read_dataset(whole))
    assert all((parts / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_metadata_know_no_clock_and_no_machine() -> None:
    records = rollout_records.rollout_records([sampled("a", "p", ["xy", "z"], [0.5, 1.0])], [[1.0, -1.0]], 1)
    made = to_parquet(records, ["right", "length"])
    assert made == to_parquet(records, ["right", "length"])
    metadata = pyarrow.parquet.read_metadata(BytesIO(made))
    assert set(metadata.metadata) == {b"ARROW:schema"} and metadata.created_by.startswith("parquet-cpp-arrow version")


def test_a_table_for_people(tmp_path: Path) -> None:
    """At the first step and two steps later; long texts lose their middle, a prompt its beginning."""
    record(tmp_path, ["question " * 10, "q\n2"])
    events = [json.loads(line) for line in (tmp_path / "job" / "events.jsonl").read_text().splitlines()]
    first, second = [event for event in events if event["kind"] == "table"]
    shown = "... question question question question "
    assert [[cell.strip() for cell in line.split(" | ")] for line in first["text"].splitlines()[1:]] == [
        ["row", "prompt", "completion", "reward", "reward_right", "reward_length", "advantage"],
        ["a/1/0", shown.strip(), "xy", "0.5", "-", "0.5", "1"],
        ["a/1/1", shown.strip(), "z", "-", "-", "-", "0"],
    ]
    assert f"| {shown} | xy         | 0.5    |" in first["text"]
    assert first["text"].startswith("step 1: completions of the model\n")
    assert second["title"] == "step 3: completions of the model" and "q\\n2" in second["text"]
    assert [row["completion"] for row in second["rows"]] == ["x", "yy", "x", "z"]
    assert second["rows"][0]["prompt"] == "q\n2"
    (line,) = text_table([{"completion": "a" * 40 + "b" * 40}]).splitlines()[1:]
    assert line == "a" * 37 + "..." + "b" * 20


def test_repeated_completions() -> None:
    """Of four completions the second is the first one again, and so is the fourth: two of three. In the other group
    none is."""
    repeated = sampled("a", "p", ["x", "x", "yy", "x"], [1.0, 1.0, 0.0, 1.0])
    for index in (1, 3):
        repeated.completions[index] = repeated.completions[0]
    different = sampled("b", "p", ["x", "x", "yy", "x"], [1.0, 1.0, 0.0, 1.0])
    assert rollout_metrics([repeated, different])["completions/duplicate_ratio"] == pytest.approx((2 / 3 + 0) / 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "model", seed=1)
    rows = [
        {"prompt": "abc", "completion": "de"},
        {"prompt": "da", "completion": "b"},
        {"prompt": "hg", "completion": "e"},
    ]
    return {"model": folder / "model", "dataset": save_dataset(folder / "rows", "prompt_completion", rows)}


def rl_in(folder: Path, made: dict[str, Path]) -> Context:
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {
        "rewards": ["tests.stages.small_models:letters"],
        "learning_rate": 1e-2,
        "train_batch_size": 6,
        "num_generations": 3,
        "max_completion_length": 4,
        "steps_per_generation": 2,
        "max_steps": 6,
        "checkpoint_steps": 2,
    }
    return local_context("rl", settings, folder=folder, inputs=dict(made))


def test_a_killed_run_keeps_the_same_rollouts(tmp_path: Path, made: dict[str, Path]) -> None:
    """Killed in sampling, in rewarding, after a generation is saved, in a step, in a checkpoint, and at the end before
    all is written: the bytes of a whole run."""
    whole = rl_in(tmp_path / "whole", made)
    whole.stage.run(whole)

    def killed(owner: Any, name: str, *, call: int, after: bool = False) -> None:
        context = rl_in(tmp_path / "killed", made)
        with killed_in(owner, name, calls=call, after=after):
            context.stage.run(context)

    killed(Sampling, "__call__", call=2)
    killed(RewardSet, "score", call=1)
    killed(Shards, "save", call=1, after=True)
    killed(Trainer, "step", call=2)
    killed(Saver, "save", call=1)
    killed(rollout_export, "describe_dataset", call=1)
    last = rl_in(tmp_path / "killed", made)
    last.stage.run(last)
    assert last.resumed_from == 4
    for name in ("data-00000.parquet", "dataset.json", "ledger.json"):
        assert (output(last, "rollouts") / name).read_bytes() == (output(whole, "rollouts") / name).read_bytes()
    assert (output(last, "model") / "model.safetensors").read_bytes() == (
        output(whole, "model") / "model.safetensors"
    ).read_bytes()
    rows = list(read_dataset(output(last, "rollouts")))
    # three generations of four groups of three; each begins at the first of its two steps
    assert [row["step"] for row in rows] == [1] * 12 + [3] * 12 + [5] * 12
    assert len({row["row_id"] for row in rows}) == 36
    samples = read_lines(output(last, "model") / "samples.jsonl")
    assert [(row["row_id"], row["completion"]) for row in samples] == [
        (row["row_id"], row["completion"]) for start in (0, 12, 24) for row in rows[start : start + 3]
    ]
