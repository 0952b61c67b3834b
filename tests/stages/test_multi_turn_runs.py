"""Stage rl with tools and environments on random models: log-probabilities and gradients against transformers on the
whole transcripts, records, and runs that are killed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from artifacts import Artifact
from artifacts.digest import sha256_file
from stages.context import local_context
from tests.data.characters import build_tokenizer
from tests.stages.interruptions import Killed, kill_after
from tests.stages.small_models import output, read_lines, rows_of, run_stage, save_dataset
from tests.two_ranks import two_ranks
from tests.warm import Warm

HERE = "tests.stages.multi_turn_code"
TEMPLATE = (
    "{% if tools %}g{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}>{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<eos>"
    "{% elif m.role == 'tool' %}={{ m.content }}{% else %}<{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
CALLS = [f'<tool_call>{{"name": "pick", "arguments": {{"number": {number}}}}}</tool_call>' for number in (2, 5, 8, 9)]
"""A token each, so that a random model calls; the last two raise IndexError."""
ROWS = [{"prompt": [{"role": "user", "content": text}]} for text in ("abc", "da", "hgf", "cab")]
TRAINING: dict[str, Any] = {
    "learning_rate": 1e-3,
    "train_batch_size": 64,
    "num_generations": 16,
    "max_completion_length": 40,
    "rewards": [f"{HERE}:variety"],
}
WITH_TOOLS = {**TRAINING, "tools": [f"{HERE}:pick"], "max_tool_calling_iterations": 2}
WITH_ENVIRONMENT = {
    **TRAINING,
    "environment": {"name": f"{HERE}:Letters", "max_turns": 3, "on_error": "unscored"},
    "rewards": ["environment", f"{HERE}:variety"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = build_tokenizer(template=TEMPLATE)
    tokenizer.add_tokens(CALLS)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return {"model": folder / "model", "dataset": save_dataset(folder / "rows", "prompt", ROWS, conversational=True)}


Run = tuple[list[dict[str, Any]], list[dict[str, Any]], Path]
"""(metrics, rollouts, folder of the rollouts)"""


def run(folder: Path, inputs: dict[str, Path], settings: dict[str, Any]) -> Run:
    AcceleratorState._reset_state(reset_partial_state=True)
    context = run_stage("rl", folder, inputs, **settings)
    rollouts = output(context, "rollouts")
    return read_lines(output(context, "model") / "metrics.jsonl"), rows_of(rollouts), rollouts


@pytest.fixture(scope="module")
def with_tools(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("tools"), inputs, {**WITH_TOOLS, "max_steps": 1})


@pytest.fixture(scope="module")
def with_environment(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("environment"), inputs, {**WITH_ENVIRONMENT, "max_steps": 1})


@pytest.mark.parametrize("kind", ["with_tools", "with_environment"])
def test_held_out_prompts_have_their_turns(
    kind: str, inputs: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Beside a run that they change in nothing; the same is measured of them as of those that are trained on."""
    steps, rows, _ = request.getfixturevalue(kind)
    settings = WITH_TOOLS if kind == "with_tools" else WITH_ENVIRONMENT
    apart = {"eval_temperature": 1.0, "eval_num_generations": 16, "max_steps": 1}
    found, records, _ = run(tmp_path, {**inputs, "eval_dataset": inputs["dataset"]}, settings | apart)
    assert records == rows
    kept = [{name: value for name, value in row.items() if not name.startswith("eval/")} for row in found]
    assert kept == [{"step": 0}, *steps]
    turns = [name for name in steps[0] if name.startswith(("tools/", "environment/", "completions/", "rewards/"))]
    assert len(turns) > 8 and {f"eval/{name}" for name in turns} <= found[0].keys()


def teacher_forced(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """[T]: transformers' log-probability of each token of a transcript."""
    ids = torch.tensor([*row["prompt_ids"], *row["token_ids"]])
    logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return logprobs[len(row["prompt_ids"]) - 1 :]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["with_tools", "with_environment"])
def test_logprobs_are_those_of_the_whole_transcript(
    kind: str, inputs: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    """Every turn's tokens under transformers with everything before them in place; answers have none."""
    _, rows, _ = request.getfixturevalue(kind)
    model = AutoModelForCausalLM.from_pretrained(inputs["model"]).eval()
    several = 0
    for row in rows:
        own = torch.tensor(row["loss_mask"], dtype=torch.bool)
        with torch.no_grad():
            expected = torch.where(own, teacher_forced(model, row), 0.0)
        torch.testing.assert_close(torch.tensor(row["logprobs"]), expected, atol=2e-5, rtol=0, check_dtype=False)
        several += row["turns"] > 1
    assert several >= 5


@pytest.mark.parametrize("kind", ["with_tools", "with_environment"])
def test_only_the_models_own_tokens_are_trained(
    kind: str, inputs: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    """The gradient of DAPO at ratio 1, by hand: advantages over the model's own tokens, divided by their number."""
    (step, *_), rows, _ = request.getfixturevalue(kind)
    model = AutoModelForCausalLM.from_pretrained(inputs["model"])
    learnt = [row for row in rows if row.get("environment_error") is None]
    count = sum(sum(row["loss_mask"]) for row in learnt)
    for row in learnt:
        own = torch.tensor(row["loss_mask"], dtype=torch.bool)
        (-row["advantage"] * teacher_forced(model, row)[own].sum() / count).backward()
    norm = math.sqrt(sum(float((one.grad**2).sum()) for one in model.parameters() if one.grad is not None))
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_metrics_of_tools_are_those_of_the_records(with_tools: Run) -> None:
    (step, *_), rows, _ = with_tools
    calls = [turn for row in rows for message in row["completion"] for turn in message.get("tool_calls", [])]
    results = [message["content"] for row in rows for message in row["completion"] if message["role"] == "tool"]
    failed = [content for content in results if content.startswith('{"error"')]
    assert {*results} - {*failed} <= {"c", "f"} and set(failed) <= {
        '{"error": "IndexError: string index out of range"}'
    }
    made, failures = sum(row["tool_calls"] for row in rows), sum(row["tool_failures"] for row in rows)
    # a result that finds no room is not shown
    assert 0 < len(results) <= made <= len(calls) and len(failed) <= failures
    assert step["tools/call_frequency"] == pytest.approx(made / len(rows))
    assert step["tools/failure_frequency"] == pytest.approx(failures / made)
    assert step["completions/mean_length"] == pytest.approx(sum(sum(row["loss_mask"]) for row in rows) / len(rows))
    answered = sum(len(row["token_ids"]) - sum(row["loss_mask"]) for row in rows)
    assert step["turns/mean_answered_length"] == pytest.approx(answered / len(rows))
    assert all(row["reward"] == len({c for turn in row["completion"] for c in turn["content"]}) for row in rows)


def test_environment_rewards_stand_beside_others_and_broken_episodes_are_left_out(with_environment: Run) -> None:
    (step, *_), rows, _ = with_environment
    broken = [row for row in rows if row["environment_error"] is not None]
    assert 0 < len(broken) < len(rows)
    for row in rows:
        assert row["prompt"][-1]["content"].endswith("h")  # what reset shows
        given = row["environment_rewards"]
        if row in broken:
            assert row["environment_error"].endswith("step: ValueError: h") and row["ending"] == "broken"
            assert (row["reward"], row["reward_environment"], row["advantage"]) == (None, None, 0.0)
        else:
            assert row["reward_environment"] == (sum(given) if given else None)
            assert row["reward"] == (row["reward_environment"] or 0.0) + row["reward_variety"]
    assert step["environment/failure_frequency"] == pytest.approx(len(broken) / len(rows))


def test_recorded_rollouts_give_the_same_gradient(with_tools: Run, inputs: dict[str, Path], tmp_path: Path) -> None:
    """Replayed at the weights that sampled them; masks and episodes come from the records."""
    (step, *_), _, folder = with_tools
    settings = {name: value for name, value in TRAINING.items() if name != "rewards"}
    (again, *_), _, _ = run(tmp_path, {"model": inputs["model"], "rollouts": folder}, {**settings, "max_steps": 1})
    assert again["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize("settings", [WITH_TOOLS, WITH_ENVIRONMENT], ids=["tools", "environment"])
def test_a_killed_run_makes_the_same_bytes(
    settings: dict[str, Any], inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the third generation is saved; steps of the second are still to come in the checkpoint then."""
    settings = {**settings, "max_steps": 6, "steps_per_generation": 2, "checkpoint_steps": 1}
    _, _, whole = run(tmp_path / "whole", inputs, settings)
    with monkeypatch.context() as killing:
        kill_after(killing, 3)
        with pytest.raises(Killed):
            run(tmp_path / "killed", inputs, settings)
    _, _, resumed = run(tmp_path / "killed", inputs, settings)
    assert contents(resumed) == contents(whole)
    assert contents(resumed.parent / "model") == contents(whole.parent / "model")


def test_two_processes_play_what_one_plays(
    inputs: dict[str, Path], with_tools: Run, tmp_path: Path, warm_process: Warm
) -> None:
    """Over gloo, half of the prompts each: turns, calls and answers follow from the seeds alone."""
    context = local_context("rl", {**WITH_TOOLS, "max_steps": 1}, folder=tmp_path, inputs=dict(inputs))
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(asdict(replace(context.spec, processes=2))))
    with two_ranks(tmp_path / "ranks", warm_process) as ranks:
        assert ranks(spec) == 0, (tmp_path / "ranks" / "log.txt").read_text()
    result = json.loads((Path(context.spec.job) / "result.json").read_text())
    digest = result["outputs"]["rollouts"]["id"].removeprefix("sha256:")
    found = rows_of(context.store.materialize(Artifact("dataset", digest)))
    (step, *_), expected, _ = with_tools
    for one, other in zip(expected, found, strict=True):
        assert other["logprobs"] == pytest.approx(one["logprobs"], abs=1e-5)
        assert other["advantage"] == pytest.approx(one["advantage"], abs=1e-5)
        assert {**other, "logprobs": (), "advantage": ()} == {**one, "logprobs": (), "advantage": ()}
    assert sum(row["tool_calls"] for row in found) > 10
    assert result["metrics"]["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)
