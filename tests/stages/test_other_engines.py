"""Stages beside rl and ppo whose completions a server samples: the same numbers as with the embedded engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from artifacts.errors import StageError
from stages import a2po, distill, evaluate, online_dpo, sample
from stages.context import Context, local_context
from tests.data.characters import ids
from tests.rollouts.model_server import model_server
from tests.stages.small_models import output, read_lines, rows_of, save_dataset, save_model

PROMPTS = [{"prompt": prompt, "completion": ""} for prompt in ("abc", "da", "hgf", "cab", "e", "bad")]
LETTERS = ["tests.stages.small_models:letters"]
APART = {"engine": "vllm_server"}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    for seed, name in enumerate(("model", "other"), start=1):
        save_model(tmp_path / name, seed)
    return {"model": tmp_path / "model", "dataset": save_dataset(tmp_path / "rows", "prompt_completion", PROMPTS)}


def done(stage: str, folder: Path, inputs: dict[str, Path], **settings: Any) -> Context:
    AcceleratorState._reset_state(reset_partial_state=True)
    store = str(folder.parent / "store")
    context = local_context(stage, settings, folder=folder, inputs=dict(inputs), store=store)
    with context.resources:
        context.stage.run(context)
    return context


def results(folder: Path, inputs: dict[str, Path], **settings: Any) -> tuple[Any, list[dict[str, Any]]]:
    context = done("evaluate", folder, inputs, rewards=LETTERS, threshold=3, max_completion_length=6, **settings)
    made = output(context, "evaluation")
    return json.loads((made / "results.json").read_text(encoding="utf-8")), read_lines(made / "samples.jsonl")


def test_an_evaluation_is_that_of_the_embedded_engine(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Of the stage's weights: the server has those of another model before."""
    expected = results(tmp_path / "here", inputs)
    with model_server(tmp_path / "other") as (server, rollouts):
        assert results(tmp_path / "there", inputs, rollouts=rollouts) == expected
        assert server.loads == 1
        assert server.asked == len(PROMPTS)


def test_an_evaluation_of_an_adapter(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """The server, which has the base, is sent what the adapter makes of it."""
    learning = {"lora_r": 4, "merge_adapters": False, "learning_rate": 0.1, "max_steps": 3, "train_batch_size": 4}
    rows = [{"prompt": "a", "completion": "bcd"}, {"prompt": "b", "completion": "ha"}] * 2
    chats = save_dataset(tmp_path / "chats", "prompt_completion", rows)
    trained = done("sft", tmp_path / "sft", {**inputs, "dataset": chats}, **learning)
    adapted = {**inputs, "model": output(trained, "adapter")}
    expected = results(tmp_path / "here", adapted)
    assert expected[1] != results(tmp_path / "plain", inputs)[1]
    with model_server(tmp_path / "model") as (_, rollouts):
        assert results(tmp_path / "there", adapted, rollouts=rollouts) == expected


def test_a_server_that_keeps_other_weights_is_found_out(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with model_server(tmp_path / "other") as (server, rollouts):
        monkeypatch.setattr(server, "_load", lambda folder: {})
        with pytest.raises(StageError, match="the sync did not reach the engine"):
            results(tmp_path / "there", inputs, rollouts=rollouts)


def test_samples_are_of_the_model(tmp_path: Path, inputs: dict[str, Path]) -> None:
    settings = {"temperature": 0, "num_generations": 1, "outputs": ["completions"], "max_completion_length": 6}
    expected = rows_of(output(done("sample", tmp_path / "here", inputs, **settings), "completions"))
    with model_server(tmp_path / "other") as (_, rollouts):
        there = done("sample", tmp_path / "there", inputs, **settings, rollouts=rollouts)
    assert rows_of(output(there, "completions")) == expected


def divergence(student: Any, teacher: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """[completion tokens] KL(student || teacher), by transformers."""
    with torch.no_grad():
        tokens = torch.tensor([[*prompt, *completion]])
        ours, theirs = (m(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (student, teacher))
    return (ours.exp() * (ours - theirs)).sum(-1)


def test_a_student_distills_what_a_server_samples_of_its_weights(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Every update reaches the server before it samples again: each sync is proved, and the first loss is that of
    transformers on the completions that the server gave."""
    teacher, student = save_model(tmp_path / "teacher", seed=3), save_model(tmp_path / "again", seed=1)
    settings = {"max_completion_length": 5, "train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2}
    given: list[tuple[list[int], list[int]]] = []
    with model_server(tmp_path / "other") as (server, rollouts):
        one = server._one

        def noted(body: dict[str, Any], seed: int) -> dict[str, Any]:
            made = one(body, seed)
            given.append((body["prompt"], made["token_ids"]))
            return made

        server._one = noted
        distilled = {**inputs, "teacher": tmp_path / "teacher"}
        engine = {**rollouts, "proof_interval": 1}
        context = done("distill", tmp_path / "there", distilled, **settings, rollouts=engine)
        assert server.loads == 3
    rows = read_lines(output(context, "model") / "metrics.jsonl")
    values = torch.cat([divergence(student, teacher, *pair) for pair in given[:4]])
    assert rows[0]["loss"] == pytest.approx(float(values.mean()), rel=1e-4)
    assert rows[1]["loss"] != rows[0]["loss"]


TAUGHT = {
    "num_generations": 4,
    "success_reward_threshold": 2.0,
    "reprompt_template": "{prompt}{solution}",
    "solution_template": "{successful_previous_attempt}",
}


@pytest.mark.parametrize(("stage", "more"), [("online_dpo", {}), ("a2po", {"beta2": 0.1}), ("sdpo", TAUGHT)])
def test_online_stages(stage: str, more: dict[str, Any], tmp_path: Path, inputs: dict[str, Path]) -> None:
    """The trainer finds the tokens as likely as the server that sampled them, after every update."""
    settings = {"max_completion_length": 5, "train_batch_size": 4, "max_steps": 2, "rewards": LETTERS, **more}
    if stage == "a2po":
        sampling = {"outputs": ["completions"], "max_completion_length": 5, "rewards": LETTERS}
        inputs = {**inputs, "samples": output(done("sample", tmp_path / "samples", inputs, **sampling), "completions")}
    with model_server(tmp_path / "other") as (server, rollouts):
        engine = {**rollouts, "proof_interval": 1}
        context = done(stage, tmp_path / "there", inputs, **settings, learning_rate=1e-2, rollouts=engine)
        assert server.loads == 2
    rows = rows_of(output(context, "rollouts"))
    assert {row["weight_version"] for row in rows} == {0, 1}
    assert all(row["weight_versions"] == [row["weight_version"]] * len(row["token_ids"]) for row in rows)


@pytest.mark.parametrize("changes", [{}, {"lora_r": 2}, {"reference": "reference"}])
def test_xpo_samples_both_authors_with_one_engine(changes: Any, tmp_path: Path, inputs: dict[str, Path]) -> None:
    """It is sent the policy's weights and the reference's in turn; both syncs of every step are proved, and
    transformers finds the second completions as likely under the reference: the policy before the first step (with
    adapters, which are merged for the policy and off for the reference), or a model of its own."""
    settings = {"max_completion_length": 5, "train_batch_size": 4, "max_steps": 2, "rewards": LETTERS}
    settings |= {"xpo_alpha": 0.5, "learning_rate": 5e-2, "temperature": 1.0, **changes}
    seed = 1
    if "reference" in settings:
        seed, inputs = 7, {**inputs, "reference": tmp_path / settings.pop("reference")}
    reference = save_model(tmp_path / "reference", seed)
    with model_server(tmp_path / "other") as (server, rollouts):
        engine = {**rollouts, "proof_interval": 1}
        context = done("online_dpo", tmp_path / "there", inputs, **settings, rollouts=engine)
        assert server.loads == 4
    rows = rows_of(output(context, "rollouts"))
    authors = [[row for row in rows if int(row["row_id"].rpartition("/")[2]) % 2 == place] for place in (0, 1)]
    assert [{tuple(row["weight_versions"])[:1] for row in of_one} for of_one in authors] == [{(0,), (1,)}, {(0,)}]
    for row in authors[1]:
        tokens, first = torch.tensor([[*ids(row["prompt"]), *row["token_ids"]]]), len(row["prompt"])
        with torch.no_grad():
            logs_TV = reference(tokens).logits[0, first - 1 : -1].log_softmax(-1)
        found = logs_TV[range(len(row["token_ids"])), row["token_ids"]]
        assert row["logprobs"] == pytest.approx(found.tolist(), abs=1e-4)


def test_a_reference_of_another_form_is_refused_by_an_engine(tmp_path: Path, inputs: dict[str, Path]) -> None:
    model = save_model(tmp_path / "reference", 2)
    model.config.intermediate_size = 40
    type(model)(model.config).save_pretrained(tmp_path / "reference")
    settings = {"max_completion_length": 5, "train_batch_size": 4, "max_steps": 2, "rewards": LETTERS, "xpo_alpha": 0.5}
    wired = {**inputs, "reference": tmp_path / "reference"}
    said = r"down_proj.weight: \(16, 40\) and \(16, 24\)\), and rollouts.engine, which samples both"
    with model_server(tmp_path / "other") as (_, rollouts), pytest.raises(StageError, match=said):
        done("online_dpo", tmp_path / "there", wired, **settings, rollouts=rollouts)


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        (evaluate, {"tasks": ["loss"]}, "neither accuracy nor reward, so nothing is sampled"),
        (sample, {"rollouts": {"engine": "vllm", "enable_sleep_mode": True}}, "enable_sleep_mode is of stages"),
        (evaluate, {"rollouts": {"engine": "vllm", "lora_sync": "adapter"}}, "rollouts.lora_sync is of stages that"),
        (evaluate, {"rollouts": {"engine": "vllm", "proof_interval": 2}}, "rollouts.proof_interval is of stages that"),
        (
            distill,
            {"loss_top_k": 2, "teacher_engine": {"engine": "vllm_server", "lora_sync": "adapter"}},
            "teacher_engine.lora_sync is of what is trained; a teacher stays",
        ),
        (distill, {"lmbda": 0.0}, "rollouts.engine is vllm_server, but lmbda is 0"),
        (
            online_dpo,
            {"rewards": LETTERS, "xpo_alpha": 0.1, "lora_r": 2, "rollouts": {**APART, "lora_sync": "adapter"}},
            "xpo_alpha samples the reference too, and rollouts.lora_sync adapter",
        ),
        (a2po, {"rewards": LETTERS, "top_p": 0.5, "min_p": 0.5}, "min_p together with top_p"),
    ],
)
def test_what_does_not_go_together(stage: Any, settings: dict[str, Any], message: str) -> None:
    config = stage.Config(**{"rollouts": APART, **settings})
    assert any(message in problem for problem in stage.check(config, frozenset({"teacher"})))
