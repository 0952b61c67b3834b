"""`sample`: which completions become rows and pairs, by hand and through the stage."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import StageError
from stages.evaluation import answers as answers_module
from stages.evaluation.answers import Answer
from stages.evaluation.choosing import best_answers, choose_pairs, why_no_best, why_no_pair
from stages.sample import STAGE, Config, check
from tests.stages.interruptions import Killed, kill_after
from tests.stages.small_models import (
    count_saves,
    logged,
    output,
    read_json,
    rows_of,
    run_stage,
    save_dataset,
    save_model,
    states,
)

PROMPTS = ["abc", "hg", "a b", "eeee", "cafe", "b", "dad", "gag"]
# right: a text with at least two letters of a to d; unscored: an empty text
JUDGE = """
def judge(completions, **columns):
    return [float(sum(letter in "abcd" for letter in text)) / 2 if text else None for text in completions]
"""


def made(*scored: tuple[str, float | None], row_id: str = "r0") -> list[Answer]:
    """Answers with these texts and rewards."""
    return [
        Answer(row_id, index, text, len(text), True, {"reward": value}, {})
        for index, (text, value) in enumerate(scored)
    ]


def test_best_is_the_highest_and_the_earliest_of_equals() -> None:
    group = made(("a", 1.0), ("b", 2.0), ("c", 2.0), ("d", None), ("b", 2.0))
    assert [answer.sample for answer in best_answers(group, 1.0, keep_all=False)] == [1]
    assert [answer.sample for answer in best_answers(group, 1.5, keep_all=True)] == [1, 2]
    assert best_answers(group, 2.5, keep_all=False) == []
    assert [answer.sample for answer in best_answers(made(("a", -3.0), ("b", -1.0)), None, keep_all=False)] == [1]


def test_pairs_are_right_against_wrong_and_no_text_is_in_two() -> None:
    group = made(("a", 1.0), ("b", 1.0), ("a", 1.0), ("x", 0.0), ("y", 0.5), ("x", 0.0), ("z", None), ("b", 0.0))
    for seed in range(20):
        pairs = choose_pairs(group, 1.0, min_gap=0.0, count=9, seed=seed)
        # two right texts and three wrong ones (x, y, b), one of which is also right: at most two pairs
        assert 1 <= len(pairs) <= 2
        texts = [answer.text for pair in pairs for answer in pair]
        assert len(set(texts)) == len(texts)
        for chosen, rejected in pairs:
            assert chosen.totals["reward"] == 1.0 > rejected.totals["reward"]
    assert choose_pairs(group, 1.0, min_gap=1.1, count=9, seed=0) == []
    far = choose_pairs(group, 1.0, min_gap=0.6, count=9, seed=0)
    assert far and all(rejected.totals["reward"] == 0.0 for _, rejected in far)


def test_the_seed_and_the_row_choose_the_pair() -> None:
    def chosen(seed: int, row_id: str) -> list[tuple[int, int]]:
        group = made(*((letter, float(letter < "e")) for letter in "abcdefgh"), row_id=row_id)
        return [(a.sample, b.sample) for a, b in choose_pairs(group, 1.0, min_gap=0, count=4, seed=seed)]

    assert chosen(1, "r0") == chosen(1, "r0")
    assert len({tuple(chosen(seed, "r0")) for seed in range(5)}) > 1
    assert len({tuple(chosen(1, f"r{row}")) for row in range(5)}) > 1
    assert all(len(chosen(seed, "r0")) == 4 for seed in range(5))


def test_without_a_threshold_pairs_are_better_against_worse() -> None:
    pairs = choose_pairs(made(("a", -2.0), ("b", -1.0)), None, min_gap=0.5, count=3, seed=0)
    assert [(chosen.text, rejected.text) for chosen, rejected in pairs] == [("b", "a")]


@pytest.mark.parametrize(
    ("group", "threshold", "why"),
    [
        (made(("a", 1.0), ("b", 2.0)), 1.0, "filtered: all right"),
        (made(("a", 0.0), ("b", None)), 1.0, "filtered: all wrong"),
        (made(("a", None)), 1.0, "filtered: not scored"),
        (made(("a", 3.0), ("b", 3.0)), None, "filtered: all rewards equal"),
        (made(("a", 1.0), ("b", 0.9)), 1.0, "filtered: gap below min_gap, or equal texts"),
    ],
)
def test_prompts_without_a_pair_say_why(group: list[Answer], threshold: float | None, why: str) -> None:
    assert choose_pairs(group, threshold, min_gap=0.2, count=1, seed=0) == []
    assert why_no_pair(group, threshold) == why


def test_prompts_without_a_right_answer_say_why() -> None:
    assert why_no_best(made(("a", 0.0), ("b", None))) == "filtered: all wrong"
    assert why_no_best(made(("a", None))) == "filtered: not scored"


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    save_model(tmp_path / "model", seed=1)
    (tmp_path / "judge.py").write_text(JUDGE, encoding="utf-8")
    rows = [{"prompt": prompt, "answer": prompt[0], "completion": "gold"} for prompt in PROMPTS]
    data = save_dataset(tmp_path / "data", "prompt_completion", rows)
    return {"model": tmp_path / "model", "dataset": data}


def settings(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "rewards": [f"{tmp_path}/judge.py:judge"],
        "num_generations": 6,
        "max_completion_length": 5,
        "pairs_per_prompt": 2,
    } | changes


def test_the_three_datasets_agree(tmp_path: Path, inputs: dict[str, Path]) -> None:
    context = run_stage("sample", tmp_path / "run", inputs, **settings(tmp_path, max_length=3))
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows_of(output(context, "completions")):
        assert row["row_id"] == f"{row['prompt_row_id']}/{row['sample']}"
        assert row["answer"] == row["prompt"][0] and row["prompt"] in PROMPTS
        letters = sum(letter in "abcd" for letter in row["completion"])
        assert row["reward"] == row["reward_judge"] == (letters / 2 if row["completion"] else None)
        groups[row["prompt_row_id"]].append(row)
    assert {len(group) for group in groups.values()} == {6}
    assert set(groups) == {f"r{i}" for i, prompt in enumerate(PROMPTS) if len(prompt) <= 3}
    best = {row["prompt_row_id"]: row for row in rows_of(output(context, "best"))}
    for row_id, group in groups.items():
        rewards = [-1.0 if row["reward"] is None else row["reward"] for row in group]
        if max(rewards) >= 1:
            assert best[row_id] == group[rewards.index(max(rewards))]
        else:
            assert row_id not in best
    by_id = {row["row_id"]: row for group in groups.values() for row in group}
    seen = set()
    for row in rows_of(output(context, "pairs")):
        i, j = row["row_id"].removeprefix(f"{row['prompt_row_id']}/").split("-")
        chosen, rejected = (by_id[f"{row['prompt_row_id']}/{sample}"] for sample in (i, j))
        assert (row["chosen"], row["rejected"]) == (chosen["completion"], rejected["completion"])
        assert (row["chosen_score"], row["rejected_score"]) == (chosen["reward"], rejected["reward"])
        assert row["chosen_score"] >= 1 > row["rejected_score"]
        assert row["prompt"] == chosen["prompt"] == rejected["prompt"]
        for text in (row["chosen"], row["rejected"]):
            assert (row["prompt_row_id"], text) not in seen
            seen.add((row["prompt_row_id"], text))
    assert seen
    assert states(output(context, "completions")) == {"filtered: prompt too long": 2, "used": 6}
    told = [line for line in logged(output(context, "completions").parents[1]) if line.startswith("completions")]
    assert told == ["completions: 8 rows: 6 used; 2 dropped: filtered: prompt too long"]
    assert states(output(context, "best")).get("used") == len(best)
    assert sum(states(output(context, "pairs")).values()) == len(PROMPTS)
    assert states(output(context, "pairs"))["used"] == len({row_id for row_id, _ in seen})
    rewards = [row["reward"] for row in by_id.values() if row["reward"] is not None]
    assert context.metrics["accuracy"] == pytest.approx(sum(value >= 1 for value in rewards) / len(rewards))
    assert context.metrics["accuracy/any"] == pytest.approx(len(best) / len(groups))


def all_files(context: Any) -> dict[str, bytes]:
    root = Path(context.spec.job) / "out"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_killed_run_ends_with_the_same_bytes(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "_SHARD_COMPLETIONS", 12)
    whole = run_stage("sample", tmp_path / "whole", inputs, **settings(tmp_path))
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            run_stage("sample", tmp_path / "killed", inputs, **settings(tmp_path))
    with monkeypatch.context() as patch:
        names = count_saves(patch)
        resumed = run_stage("sample", tmp_path / "killed", inputs, **settings(tmp_path))
    assert names == ["answers-00000004-00000006", "answers-00000006-00000008"]
    assert all_files(resumed) == all_files(whole)
    other = run_stage("sample", tmp_path / "other", inputs, **settings(tmp_path, seed=7))
    assert all_files(other) != all_files(whole)


def test_what_a_setting_does_not_touch_keeps_its_bytes(tmp_path: Path, inputs: dict[str, Path]) -> None:
    one = all_files(run_stage("sample", tmp_path / "one", inputs, **settings(tmp_path)))
    other = all_files(run_stage("sample", tmp_path / "other", inputs, **settings(tmp_path, keep="all_right")))
    assert {name for name in one if one[name] != other[name]} == {"best/data.parquet", "best/dataset.json"}


def test_a_damaged_shard_is_computed_again(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "_SHARD_COMPLETIONS", 12)
    whole = run_stage("sample", tmp_path / "run", inputs, **settings(tmp_path))
    before = all_files(whole)
    shard = next((tmp_path / "run" / "store").rglob("answers-00000002-*"))
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes().replace(b'"text"', b'"texT"', 1))
    names = count_saves(monkeypatch)
    again = run_stage("sample", tmp_path / "run", inputs, **settings(tmp_path))
    assert names == ["answers-00000002-00000004"]
    assert all_files(again) == before


def test_conversations_stay_conversations(tmp_path: Path, inputs: dict[str, Path]) -> None:
    source = "def judge(completions, **_):\n    return [float('a' in turn[0]['content']) for turn in completions]\n"
    (tmp_path / "turns.py").write_text(source, encoding="utf-8")
    rows = [{"prompt": [{"role": "user", "content": prompt}], "kind": "x"} for prompt in PROMPTS]
    data = save_dataset(tmp_path / "chats", "prompt", rows, conversational=True)
    changes = {"rewards": [f"{tmp_path}/turns.py:judge"], "num_generations": 8}
    context = run_stage("sample", tmp_path / "run", inputs | {"dataset": data}, **settings(tmp_path, **changes))
    for name, columns in (("best", ["completion"]), ("pairs", ["chosen", "rejected"])):
        description = read_json(output(context, name) / "dataset.json")
        assert description["conversational"] is True
        for row in rows_of(output(context, name)):
            assert row["prompt"][0]["role"] == "user" and row["kind"] == "x"
            for column in columns:
                assert [turn["role"] for turn in row[column]] == ["assistant"]
                assert ("a" in row[column][0]["content"]) == (column != "rejected")


def test_the_reward_model_is_one_more_reward(tmp_path: Path, inputs: dict[str, Path]) -> None:
    save_model(tmp_path / "judge", seed=4, reward=True)
    changes = {"reward_weights": [0.0, 2.0], "threshold": None, "outputs": ["completions", "pairs"], "min_gap": 0.1}
    context = run_stage(
        "sample", tmp_path / "run", {**inputs, "reward_model": tmp_path / "judge"}, **settings(tmp_path, **changes)
    )
    for row in rows_of(output(context, "completions")):
        assert row["reward"] == pytest.approx(2 * row["reward_reward_model"])
    for row in rows_of(output(context, "pairs")):
        assert row["chosen_score"] - row["rejected_score"] >= 0.1
    assert not output(context, "best").exists()
    assert "accuracy" not in context.metrics


def test_completions_alone_need_no_reward(tmp_path: Path, inputs: dict[str, Path]) -> None:
    context = run_stage(
        "sample",
        tmp_path / "run",
        inputs,
        outputs=["completions"],
        limit=3,
        temperature=0,
        num_generations=1,
        max_completion_length=5,
    )
    rows = rows_of(output(context, "completions"))
    assert len(rows) == 3 and all("reward" not in row for row in rows)
    assert states(output(context, "completions")) == {"filtered: not drawn by limit": 5, "used": 3}


def test_nothing_that_qualifies_is_an_error_with_counts(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(StageError, match=r"output best has no row \(prompts: 8 filtered: all wrong\).*threshold"):
        run_stage("sample", tmp_path / "a", inputs, **settings(tmp_path, threshold=50))
    always = settings(tmp_path, threshold=-1, outputs=["pairs"])
    with pytest.raises(StageError, match=r"output pairs has no row \(prompts: 8 filtered: all right\)"):
        run_stage("sample", tmp_path / "b", inputs, **always)
    assert not list((tmp_path / "a" / "job").rglob("*.parquet"))


@pytest.mark.parametrize(
    ("config", "messages"),
    [
        ({}, ["output best needs rewards", "output pairs needs rewards"]),
        ({"outputs": []}, ["outputs is empty"]),
        ({"rewards": ["exact_match"], "num_generations": 1}, ["pairs needs num_generations of 2 or more"]),
        ({"rewards": ["exact_match"], "temperature": 0}, ["at temperature 0 gives the same completion 4 times"]),
        ({"rewards": ["exact_match"], "reward_weights": [1, 1]}, ["2 numbers for 1 rewards"]),
    ],
)
def test_contradictions_are_found_before_anything_runs(config: dict, messages: list[str]) -> None:
    problems = check(Config.model_validate(config), frozenset({"model", "dataset"}))
    assert len(problems) == len(messages)
    assert all(message in problem for message, problem in zip(messages, problems, strict=True))


def test_outputs_follow_the_configuration() -> None:
    assert STAGE.outputs_of(Config(outputs=("pairs", "completions"))) == {"completions": "dataset", "pairs": "dataset"}


def test_failures_of_rewards_are_a_metric_also_after_a_kill(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as answers without a reward: those with an a."""
    (tmp_path / "picky.py").write_text(
        "def judge(completions):\n"
        "    if any('a' in text for text in completions): raise ValueError('an a')\n"
        "    return [1.0 for _ in completions]\n"
    )
    monkeypatch.setattr(answers_module, "_SHARD_COMPLETIONS", 12)
    picky = {"rewards": [{"name": f"{tmp_path}/picky.py:judge", "on_error": "none"}], "outputs": ["completions"]}
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            run_stage("sample", tmp_path / "run", inputs, **settings(tmp_path, **picky))
    context = run_stage("sample", tmp_path / "run", inputs, **settings(tmp_path, **picky))
    rows = rows_of(output(context, "completions"))
    failed = ["a" in row["completion"] for row in rows]
    assert [row["reward_judge"] is None for row in rows] == failed
    assert context.metrics["rewards/judge/failed"] == sum(failed) > 0
    assert any("ValueError: an a (picky.py:2)" in text for text in logged(tmp_path / "run" / "job"))
