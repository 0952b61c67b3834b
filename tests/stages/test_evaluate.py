"""`evaluate` against transformers' own losses, logits and greedy completions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from artifacts.errors import StageError
from stages.evaluate import STAGE, Config, check
from stages.evaluation import answers, text
from tests.data.characters import answers as spoken
from tests.data.characters import build_tokenizer, ids
from tests.stages.interruptions import Killed, kill_after
from tests.stages.small_models import (
    count_saves,
    greedy,
    labels_loss,
    logged,
    output,
    read_json,
    read_lines,
    reward_of,
    run_stage,
    save_dataset,
    save_model,
    states,
)

COMPLETIONS = [("abc", "def"), ("hg", "a"), ("a b", "hhhhgg"), ("eeee", "bad"), ("cafe", "dead beef"), ("b", "ha")]
JUDGE = "def judge(completions, answer, **columns):\n    return [float(a == b) for a, b in zip(completions, answer)]\n"


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", seed=1)
    return tmp_path / "model"


def completion_rows() -> list[dict]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in COMPLETIONS]


def test_loss_is_that_of_transformers_row_by_row(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", seed=1)
    data = save_dataset(tmp_path / "data", "prompt_completion", completion_rows())
    context = run_stage("evaluate", tmp_path / "run", {"model": tmp_path / "model", "dataset": data})
    expected = [labels_loss(model, *row) for row in COMPLETIONS]
    records = read_lines(output(context, "evaluation") / "samples.jsonl")
    assert [record["row_id"] for record in records] == [f"r{index}" for index in range(len(COMPLETIONS))]
    for record, (total, tokens) in zip(records, expected, strict=True):
        assert record["loss_tokens"] == tokens
        assert record["loss"] == pytest.approx(total / tokens, rel=1e-5)
    loss = sum(total for total, _ in expected) / sum(tokens for _, tokens in expected)
    results = read_json(output(context, "evaluation") / "results.json")
    assert list(results) == ["loss", "perplexity"]
    assert results["loss"]["value"] == pytest.approx(loss, rel=1e-5)
    assert results["perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert results["perplexity"]["high"] == pytest.approx(math.exp(results["loss"]["high"]), rel=1e-12)
    assert results["loss"]["low"] < results["loss"]["value"] < results["loss"]["high"]
    assert results["loss"]["n"] == len(COMPLETIONS)
    assert context.metrics["loss"] == results["loss"]["value"]
    assert context.metrics["loss/low"] == results["loss"]["low"]


def test_accuracy_is_that_of_transformers_greedy_completions(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", seed=1)
    tokenizer = build_tokenizer()
    made = [tokenizer.decode(greedy(model, ids(p), 5), skip_special_tokens=True) for p, _ in COMPLETIONS]
    # the rows 0, 2 and 4 have what the model says as their answer, the others do not
    rows = [{"prompt": p, "answer": made[i] if i % 2 == 0 else "-"} for i, (p, _) in enumerate(COMPLETIONS)]
    data = save_dataset(tmp_path / "data", "prompt", rows)
    (tmp_path / "judge.py").write_text(JUDGE, encoding="utf-8")
    context = run_stage(
        "evaluate",
        tmp_path / "run",
        {"model": tmp_path / "model", "dataset": data},
        rewards=[f"{tmp_path}/judge.py:judge"],
        max_completion_length=5,
    )
    records = read_lines(output(context, "evaluation") / "samples.jsonl")
    assert [record["completion"] for record in records] == made
    assert [record["correct"] for record in records] == [True, False] * 3
    assert [record["answer"] for record in records] == [row["answer"] for row in rows]
    assert next(iter(context.metrics)) == "accuracy"
    assert context.metrics["accuracy"] == 0.5
    lengths = [len(greedy(model, ids(prompt), 5)) for prompt, _ in COMPLETIONS]
    assert context.metrics["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))


def test_completions_that_nothing_scored_count_neither_way(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 2 of 3 scored rows reach the threshold 0.5; one row, a shard of its own, is not scored
    monkeypatch.setattr(answers, "_SHARD_COMPLETIONS", 1)
    source = "def given(completions, mark, **columns):\n    return list(mark)\n"
    (tmp_path / "given.py").write_text(source, encoding="utf-8")
    rows = [{"prompt": "ab", "mark": mark} for mark in (0.5, 0.49, None, 1.0)]
    data = save_dataset(tmp_path / "data", "prompt", rows)
    context = run_stage(
        "evaluate",
        tmp_path / "run",
        {"model": model_folder, "dataset": data},
        rewards=[f"{tmp_path}/given.py:given"],
        threshold=0.5,
        max_completion_length=2,
    )
    results = read_json(output(context, "evaluation") / "results.json")
    assert results["accuracy"]["value"] == pytest.approx(2 / 3)
    assert results["accuracy"]["n"] == 3
    records = read_lines(output(context, "evaluation") / "samples.jsonl")
    assert [record["correct"] for record in records] == [True, False, None, True]
    nothing = save_dataset(tmp_path / "nothing", "prompt", [{"prompt": "ab", "mark": None}])
    with pytest.raises(StageError, match="every reward function returned None for all of them"):
        run_stage(
            "evaluate",
            tmp_path / "unscored",
            {"model": model_folder, "dataset": nothing},
            rewards=[f"{tmp_path}/given.py:given"],
            max_completion_length=2,
        )


def test_reward_is_the_reward_models_score_of_the_completions(tmp_path: Path) -> None:
    model, judge = save_model(tmp_path / "model", seed=1), save_model(tmp_path / "judge", seed=4, reward=True)
    data = save_dataset(tmp_path / "data", "prompt", [{"prompt": prompt} for prompt, _ in COMPLETIONS])
    inputs = {"model": tmp_path / "model", "dataset": data, "reward_model": tmp_path / "judge"}
    context = run_stage("evaluate", tmp_path / "run", inputs, max_completion_length=5)
    scores = [reward_of(judge, ids(prompt) + greedy(model, ids(prompt), 5)) for prompt, _ in COMPLETIONS]
    records = read_lines(output(context, "evaluation") / "samples.jsonl")
    assert [record["score"] for record in records] == pytest.approx(scores, abs=1e-5)
    assert context.metrics["reward"] == pytest.approx(sum(scores) / len(scores), abs=1e-5)


EVERYTHING = {"rewards": ["exact_match"], "max_completion_length": 4, "temperature": 1.0, "num_generations": 3}


def test_a_killed_evaluation_ends_with_the_same_bytes(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = save_dataset(tmp_path / "data", "prompt_completion", completion_rows())
    inputs = {"model": model_folder, "dataset": data}
    monkeypatch.setattr(answers, "_SHARD_COMPLETIONS", 6)
    monkeypatch.setattr(text, "_SHARD_ROWS", 2)
    whole = output(run_stage("evaluate", tmp_path / "whole", inputs, **EVERYTHING), "evaluation")
    for saves in (2, 4):  # in the middle of the answers, in the middle of the losses
        folder = tmp_path / f"killed{saves}"
        with monkeypatch.context() as patch:
            kill_after(patch, saves)
            with pytest.raises(Killed):
                run_stage("evaluate", folder, inputs, **EVERYTHING)
        with monkeypatch.context() as patch:
            names = count_saves(patch)
            context = run_stage("evaluate", folder, inputs, **EVERYTHING)
        assert len(names) == 6 - saves
        assert context.resumed_from is not None
        for name in ("results.json", "samples.jsonl", "ledger.json"):
            assert (output(context, "evaluation") / name).read_bytes() == (whole / name).read_bytes()


TWO = """
def first(completions, marks, **columns):
    return [row[index % 3] for index, row in enumerate(marks)]


def length(completions, marks, **columns):
    marked = first(completions, marks)
    return [None if mark is None else len(text) / 2 for text, mark in zip(completions, marked)]
"""


def test_rewards_and_pass_rates_by_hand(tmp_path: Path, model_folder: Path) -> None:
    """Three answers a prompt: none, one, two and all of them right; and one that is not scored."""
    (tmp_path / "two.py").write_text(TWO, encoding="utf-8")
    marks = [[0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 1], [1, None, 0]]
    data = save_dataset(tmp_path / "data", "prompt", [{"prompt": "ab", "marks": row} for row in marks])
    context = run_stage(
        "evaluate",
        tmp_path / "run",
        {"model": model_folder, "dataset": data},
        rewards=[f"{tmp_path}/two.py:first", {"name": f"{tmp_path}/two.py:length"}],
        reward_weights=[1.0, 0.0],
        num_generations=3,
        temperature=1.0,
        max_completion_length=4,
    )
    records = read_lines(output(context, "evaluation") / "samples.jsonl")
    found = context.metrics
    assert found["rewards/first/mean"] == pytest.approx(7 / 14)
    scored = [one for one in records if one["reward"] is not None]
    assert found["rewards/length/mean"] == pytest.approx(sum(len(one["completion"]) for one in scored) / 2 / 14)
    assert found["rewards/mean"] == pytest.approx(sum(one["reward"] for one in scored) / 14) == pytest.approx(7 / 14)
    # of two drawn from three: 0, 2/3, 1, 1; of two from the two that were scored: 1; of three: 0, 1, 1, 1
    assert found["accuracy/pass@2"] == pytest.approx((0 + 2 / 3 + 1 + 1 + 1) / 5)
    assert found["accuracy/pass@3"] == pytest.approx(3 / 4)
    assert found["accuracy/pass@2/low"] <= found["accuracy/pass@2"] <= found["accuracy/pass@2/high"]


def test_samples_follow_from_the_seed(tmp_path: Path, model_folder: Path) -> None:
    data = save_dataset(tmp_path / "data", "prompt_completion", completion_rows())
    inputs = {"model": model_folder, "dataset": data}
    runs = [
        run_stage("evaluate", tmp_path / name, inputs, tasks=["accuracy"], seed=seed, **EVERYTHING)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    texts = [(output(context, "evaluation") / "samples.jsonl").read_bytes() for context in runs]
    assert texts[0] == texts[1] != texts[2]
    records = [json.loads(line) for line in texts[0].splitlines()]
    assert [(record["row_id"], record["sample"]) for record in records[:4]] == [
        ("r0", 0),
        ("r0", 1),
        ("r0", 2),
        ("r1", 0),
    ]
    assert records[0]["reference"] == "def"


def test_every_row_is_in_one_state(tmp_path: Path, model_folder: Path) -> None:
    rows = [{"prompt": p, "completion": c} for p, c in [("abcdefgh", "a"), ("abc", "defgh"), ("a", "b")]]
    data = save_dataset(tmp_path / "data", "prompt_completion", rows)
    context = run_stage(
        "evaluate",
        tmp_path / "run",
        {"model": model_folder, "dataset": data},
        rewards=["exact_match"],
        max_completion_length=2,
        max_length=6,
    )
    # r0: its prompt has 8 tokens; r1: 3 + 5 + an end token are 9, of which 3 are cut
    assert states(output(context, "evaluation")) == {
        "filtered: accuracy filtered: prompt too long, loss masked": 1,
        "used: accuracy used, loss truncated": 1,
        "used": 1,
    }
    assert read_json(output(context, "evaluation") / "ledger.json")["truncated_tokens"] == 3
    assert logged(tmp_path / "run" / "job") == [
        "3 rows: 2 used; 1 dropped: filtered: accuracy filtered: prompt too long, loss masked"
    ]


def test_limit_draws_rows_by_the_seed(tmp_path: Path, model_folder: Path) -> None:
    data = save_dataset(tmp_path / "data", "prompt_completion", completion_rows())
    drawn = []
    for name, seed in (("a", 1), ("b", 1), ("c", 5)):
        context = run_stage("evaluate", tmp_path / name, {"model": model_folder, "dataset": data}, limit=3, seed=seed)
        drawn.append([record["row_id"] for record in read_lines(output(context, "evaluation") / "samples.jsonl")])
        assert states(output(context, "evaluation")) == {"filtered: not drawn by limit": 3, "used": 3}
    assert drawn[0] == drawn[1] == sorted(drawn[0]) != drawn[2]


def test_conversations_are_answered_after_the_generation_prompt(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", seed=1)
    rows = [{"messages": [{"role": "user", "content": "abc"}, *spoken("de")]}]
    data = save_dataset(tmp_path / "data", "language_modeling", rows, conversational=True)
    context = run_stage(
        "evaluate",
        tmp_path / "run",
        {"model": tmp_path / "model", "dataset": data},
        rewards=["exact_match"],
        max_completion_length=5,
        assistant_only_loss=True,
    )
    record = read_lines(output(context, "evaluation") / "samples.jsonl")[0]
    made = build_tokenizer().decode(greedy(model, ids("<abc>"), 5), skip_special_tokens=True)
    assert record["completion"] == made
    assert record["correct"] == (made.strip() == "de")
    assert record["loss"] == pytest.approx(labels_loss(model, "<abc>", "de")[0] / 3, rel=1e-5)
    assert (record["prompt"], record["reference"]) == ([{"role": "user", "content": "abc"}], spoken("de"))


def test_a_task_that_cannot_be_done_says_why(tmp_path: Path, model_folder: Path) -> None:
    data = save_dataset(tmp_path / "data", "prompt", [{"prompt": "abc"}])
    inputs = {"model": model_folder, "dataset": data}
    with pytest.raises(StageError, match=r"task loss: it takes language_modeling or prompt_completion.*type prompt"):
        run_stage("evaluate", tmp_path / "a", inputs, tasks=["loss"])
    with pytest.raises(StageError, match=r"nothing to evaluate.*accuracy: no rewards.*reward_model is not wired"):
        run_stage("evaluate", tmp_path / "b", inputs)
    save_model(tmp_path / "judge", seed=4, reward=True)
    with pytest.raises(StageError, match="gives scores and no tokens"):
        run_stage("evaluate", tmp_path / "c", {**inputs, "model": tmp_path / "judge"}, rewards=["exact_match"])
    with pytest.raises(StageError, match="max_completion_length is 64, but the model takes 64 tokens"):
        run_stage("evaluate", tmp_path / "d", inputs, rewards=["exact_match"], max_completion_length=64)


@pytest.mark.parametrize(
    ("config", "wired", "message"),
    [
        ({"tasks": ["accuracy"]}, (), "task accuracy needs rewards"),
        ({"tasks": ["reward"]}, (), "task reward needs input reward_model"),
        ({"tasks": ["loss"], "rewards": ["exact_match"]}, (), "tasks has no accuracy"),
        ({"tasks": ["loss"]}, ("reward_model",), "tasks has no reward"),
        ({"tasks": ["loss"]}, ("reference",), "input reference is wired in"),
        ({}, ("reference", "reference_logprobs"), "exclude each other"),
        ({"rewards": ["exact_match"], "reward_weights": [1, 2]}, (), "2 numbers for 1 rewards"),
        ({"num_generations": 2}, (), "at temperature 0 gives the same completion 2 times"),
        ({"rewards": ["exact_mach"]}, (), "did you mean 'exact_match'"),
    ],
)
def test_contradictions_are_found_before_anything_runs(config: dict, wired: tuple[str, ...], message: str) -> None:
    problems = check(Config.model_validate(config), frozenset({"model", "dataset", *wired}))
    assert len(problems) == 1 and message in problems[0]


def test_default_configuration_is_consistent() -> None:
    assert check(Config(), frozenset(name for name, given in STAGE.inputs.items() if given.required)) == []
