"""Rollouts scored again and made into rows: numbers by hand, row ids followed back, nothing lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from artifacts.errors import DataError, RequestError, StageError
from stages.context import Context, local_context
from stages.data.tokenize import TokenizedPrompt
from stages.rescore import RescoreConfig, check
from stages.rollouts.requests import Completion
from stages.training.rollout_export import write_rollouts
from stages.training.rollout_records import Recorder, Sampled
from tests.data.characters import ids
from tests.stages.small_models import (
    EOS,
    logged,
    output,
    read_json,
    reward_of,
    rows_of,
    run_stage,
    save_dataset,
    save_model,
    states,
)

# prompt, step: texts with their rewards by two functions, `right` and `length`, whose sum is recorded
RUN: dict[tuple[str, int], list[tuple[str, float | None, float | None]]] = {
    ("r0", 0): [("a", 0.0, 1.0), ("bb", 1.0, 2.0), ("ccc", 0.0, 3.0), ("bb", 1.0, 2.0)],
    ("r1", 0): [("d", 0.0, 1.0), ("d", 0.0, 1.0), ("d", 0.0, 1.0), ("d", 0.0, 1.0)],
    ("r0", 1): [("bb", 1.0, 2.0), ("eeee", 1.0, 4.0), ("a", 0.0, 1.0), ("f", None, None)],
}


def group(row_id: str, prompt: Any, completions: Sequence[tuple[str, float | None, float | None]]) -> Sampled:
    texts = [text for text, _, _ in completions]
    totals = [None if right is None or length is None else right + length for _, right, length in completions]
    rewards = {"right": [right for _, right, _ in completions], "length": [length for _, _, length in completions]}
    made = [Completion([5] * len(text), [-0.5] * len(text), finished=True) for text in texts]
    return Sampled(TokenizedPrompt(row_id, [7], {"prompt": prompt}), made, texts, rewards, totals)


def record(folder: Path, prompts: dict[str, Any]) -> Path:
    """The rollouts of RUN as a run of rl leaves them."""
    context = local_context("rl", {"rewards": ["exact_match"]}, folder=folder, inputs={})
    recorder = Recorder(context, num_generations=4, total_steps=2)
    for step in (0, 1):
        groups = [group(row_id, prompts[row_id], made) for (row_id, at), made in RUN.items() if at == step]
        recorder.save(step, step, groups, [[0.0] * 4 for _ in groups])
    write_rollouts(context, 2)
    return output(context, "rollouts")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rollouts, and the rows that their prompts are of; `completion` is the right answer."""
    folder = tmp_path_factory.mktemp("made")
    rows = [{"prompt": "abc", "completion": "ccc", "source": "x"}, {"prompt": "da", "completion": "d", "source": "y"}]
    dataset = save_dataset(folder / "rows", "prompt_completion", rows)
    return {"rollouts": record(folder / "run", {"r0": "abc", "r1": "da"}), "dataset": dataset}


def rescore(folder: Path, made: dict[str, Path], *inputs: str, **config: Any) -> Context:
    return run_stage("rescore", folder, {name: made[name] for name in ("rollouts", *inputs)}, **config)


def test_other_weights(tmp_path: Path, made: dict[str, Path]) -> None:
    """10 right - length, of what was recorded: nothing is called. The advantage, which was of the old sum, goes."""
    context = rescore(tmp_path, made, reward_weights={"right": 10.0, "length": -1.0})
    rows, before = rows_of(output(context, "rollouts")), rows_of(made["rollouts"])
    expected = [-1.0, 8.0, -3.0, 8.0, -1.0, -1.0, -1.0, -1.0, 8.0, 6.0, -1.0, None]
    assert [row["reward"] for row in rows] == expected
    assert context.metrics["reward"] == pytest.approx(21 / 11)
    without = ("reward", "advantage")
    assert rows == [{**row, "reward": total} for row, total in zip(drop(before, *without), expected, strict=True)]
    assert context.metrics["rewards/right/mean"] == pytest.approx(4 / 11)


def drop(rows: Sequence[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def test_other_functions(tmp_path: Path, made: dict[str, Path]) -> None:
    """exact_match compares with the dataset's completion (ccc, d), and not with the rollout's own."""
    rewards = ["exact_match", "tests.stages.small_models:letters"]
    context = rescore(tmp_path, made, "dataset", rewards=rewards, reward_weights={"exact_match": 2.0})
    rows = rows_of(output(context, "rollouts"))
    right = [0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert [row["reward_exact_match"] for row in rows] == right
    assert [row["reward_letters"] for row in rows] == [1.0] * 12
    assert [row["reward"] for row in rows] == [2 * value for value in right]
    assert "reward_length" not in rows[0] and "reward_right" not in rows[0]
    # again, of what was scored again
    both = {"rollouts": output(context, "rollouts")}
    again = rescore(tmp_path / "again", both, reward_weights={"letters": 1.0, "exact_match": 1.0})
    assert [row["reward"] for row in rows_of(output(again, "rollouts"))] == [1 + value for value in right]


def test_failures_of_functions_are_a_metric(tmp_path: Path, made: dict[str, Path]) -> None:
    """It raises for the four d and the f, so 5 of 12 are not scored."""
    (tmp_path / "picky.py").write_text(
        "def judge(completions):\n"
        "    if {'d', 'f'} & set(completions): raise ValueError('no vowel')\n"
        "    return [2.0] * len(completions)\n"
    )
    picky = {"name": f"{tmp_path}/picky.py:judge", "on_error": "none"}
    context = rescore(tmp_path / "run", made, "dataset", rewards=[picky])
    rewards = [row["reward_judge"] for row in rows_of(output(context, "rollouts"))]
    assert rewards == [2.0] * 4 + [None] * 4 + [2.0] * 3 + [None]
    assert context.metrics["rewards/judge/failed"] == 5.0


def test_a_reward_model(tmp_path: Path, made: dict[str, Path]) -> None:
    """It is given the texts, with an end token where the completion was finished."""
    AcceleratorState._reset_state(reset_partial_state=True)
    judge = save_model(tmp_path / "judge", seed=3, reward=True)
    given = {**made, "reward_model": tmp_path / "judge"}
    rows = rows_of(output(rescore(tmp_path / "run", given, "dataset", "reward_model"), "rollouts"))
    expected = [reward_of(judge, [*ids(row["prompt"] + row["completion"]), EOS]) for row in rows]
    assert [row["reward_reward_model"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert [row["reward"] for row in rows] == [row["reward_reward_model"] for row in rows]
    assert len(set(expected)) == 6  # a, bb, ccc, d, eeee, f


def test_the_best_of_each_group(tmp_path: Path, made: dict[str, Path]) -> None:
    """Recorded sums: 1 3 3 3, then 1 1 1 1, then 3 5 1 and none. bb is before ccc; eeee is the best of the third."""
    context = rescore(tmp_path, made, "dataset", outputs=["best"])
    folder = output(context, "best")
    rows = rows_of(folder)
    assert read_json(folder / "dataset.json")["type"] == "prompt_completion"
    assert [(row["row_id"], row["prompt_row_id"], row["completion"], row["reward"]) for row in rows] == [
        ("r0/1/1", "r0", "bb", 3.0),
        ("r1/1/0", "r1", "d", 1.0),
        ("r0/2/1", "r0", "eeee", 5.0),
    ]
    assert [row["source"] for row in rows] == ["x", "y", "x"] and "token_ids" not in rows[0]
    assert states(folder) == {
        "used": 3,
        "filtered: another of its group is better": 3 + 3 + 2,
        "filtered: not scored": 1,
    }


def test_all_that_reach_the_threshold(tmp_path: Path, made: dict[str, Path]) -> None:
    """bb three times: once is enough."""
    folder = output(rescore(tmp_path, made, outputs=["best"], keep="all_right", threshold=3.0), "best")
    assert [row["row_id"] for row in rows_of(folder)] == ["r0/1/1", "r0/1/2", "r0/2/1"]
    assert states(folder) == {
        "used": 3,
        "duplicate": 2,
        "filtered: below threshold": 1 + 4 + 1,
        "filtered: not scored": 1,
    }


def test_pairs_of_the_best_against_the_worst(tmp_path: Path, made: dict[str, Path]) -> None:
    """3 against 1, none of the second group, 5 against 1; the second best pair 3 against 3 has no gap."""
    context = rescore(tmp_path, made, outputs=["pairs"], pairs_per_group=2, margin=True)
    folder = output(context, "pairs")
    assert read_json(folder / "dataset.json")["type"] == "preference"
    assert rows_of(folder) == [
        {
            "row_id": "r0/1/1-0",
            "prompt": "abc",
            "chosen": "bb",
            "rejected": "a",
            "prompt_row_id": "r0",
            "chosen_row_id": "r0/1/1",
            "rejected_row_id": "r0/1/0",
            "chosen_score": 3.0,
            "rejected_score": 1.0,
            "margin": 2.0,
            "step": 1,
        },
        {
            "row_id": "r0/2/1-2",
            "prompt": "abc",
            "chosen": "eeee",
            "rejected": "a",
            "prompt_row_id": "r0",
            "chosen_row_id": "r0/2/1",
            "rejected_row_id": "r0/2/2",
            "chosen_score": 5.0,
            "rejected_score": 1.0,
            "margin": 4.0,
            "step": 2,
        },
    ]
    assert states(folder) == {"used": 4, "filtered: in no pair": 2 + 4 + 1, "filtered: not scored": 1}
    assert logged(folder.parents[1]) == [
        "pairs: 12 rows: 4 used; 8 dropped: 7 filtered: in no pair, 1 filtered: not scored"
    ]
    wide = output(rescore(tmp_path / "wide", made, outputs=["pairs"], min_gap=3.0), "pairs")
    assert [row["row_id"] for row in rows_of(wide)] == ["r0/2/1-2"] and "margin" not in rows_of(wide)[0]
    split = output(rescore(tmp_path / "split", made, outputs=["pairs"], threshold=4.0), "pairs")
    assert [row["row_id"] for row in rows_of(split)] == ["r0/2/1-2"]


def test_judged_completions(tmp_path: Path, made: dict[str, Path]) -> None:
    folder = output(rescore(tmp_path, made, outputs=["labels"], threshold=3.0), "labels")
    assert read_json(folder / "dataset.json")["type"] == "unpaired_preference"
    assert [(row["row_id"], row["completion"], row["label"]) for row in rows_of(folder)] == [
        ("r0/1/0", "a", False),
        ("r0/1/1", "bb", True),
        ("r0/1/2", "ccc", True),
        ("r1/1/0", "d", False),
        ("r0/2/1", "eeee", True),
    ]
    assert states(folder) == {"used": 5, "duplicate": 1 + 3 + 2, "filtered: not scored": 1}


def test_conversations(tmp_path: Path) -> None:
    """Completions are the assistant's turns, in pairs too."""
    prompts = {name: [{"role": "user", "content": name}] for name in ("r0", "r1")}
    rollouts = record(tmp_path / "run", prompts)
    folder = output(rescore(tmp_path / "pairs", {"rollouts": rollouts}, outputs=["pairs"]), "pairs")
    assert read_json(folder / "dataset.json")["conversational"]
    first = rows_of(folder)[0]
    assert (first["prompt"], first["chosen"][0]) == (prompts["r0"], {"role": "assistant", "content": "bb"})


@pytest.mark.parametrize(
    ("stage", "name", "settings"),
    [
        ("sft", "best", {}),
        ("preference", "pairs", {}),
        ("reward_model", "pairs", {"margin": True}),
        ("unpaired_preference", "labels", {"threshold": 3.0}),
    ],
)
def test_what_is_made_can_be_trained(
    tmp_path: Path, made: dict[str, Path], stage: str, name: str, settings: dict[str, Any]
) -> None:
    """One step on the rows, whose ids are those of the rollouts. The reward model takes the margin into its loss."""
    AcceleratorState._reset_state(reset_partial_state=True)
    save_model(tmp_path / "model", seed=1)
    rows = output(rescore(tmp_path / "rows", made, outputs=[name], **settings), name)
    size = len(rows_of(rows))
    training = {"max_steps": 1, "train_batch_size": size}
    context = run_stage(stage, tmp_path / stage, {"model": tmp_path / "model", "dataset": rows}, **training)
    (step,) = [read_json(path) for path in [next((tmp_path / stage / "job" / "out").glob("*/steps.jsonl"))]]
    assert sorted(step["rows"]) == sorted(row["row_id"] for row in rows_of(rows))
    assert context.metrics["step"] == 1


@pytest.mark.parametrize(
    ("config", "wired", "problem"),
    [
        ({"outputs": ()}, (), "outputs is empty"),
        ({"outputs": ("labels",)}, (), "output labels needs threshold"),
        ({"keep": "all_right"}, (), "keep: all_right needs threshold"),
        ({"rewards": ("exact_match",)}, (), "rewards need input dataset"),
        ({}, ("reward_model",), "rewards need input dataset"),
        ({"rewards": ("exact_mach",)}, ("dataset",), "no built-in reward 'exact_mach'"),
    ],
)
def test_what_is_wrong_before_it_runs(config: dict[str, Any], wired: tuple[str, ...], problem: str) -> None:
    assert any(problem in found for found in check(RescoreConfig(**config), frozenset(wired)))


def test_what_is_wrong_with_the_rows(tmp_path: Path, made: dict[str, Path]) -> None:
    with pytest.raises(RequestError, match=r"names 'rigth'; did you mean 'right'\?; the rewards are right, length"):
        rescore(tmp_path, made, reward_weights={"rigth": 1.0})
    with pytest.raises(DataError, match=r"no column prompt_row_id, prompt_ids, .*give output `rollouts` of a stage rl"):
        rescore(tmp_path, {"rollouts": made["dataset"]})
    others = save_dataset(tmp_path / "others", "prompt", [{"prompt": "abc"}])
    with pytest.raises(DataError, match="has no row r1, the prompt of rollout r1/1/0; give the dataset of the run"):
        rescore(tmp_path, {**made, "dataset": others}, "dataset")
    with pytest.raises(StageError, match=r"output pairs has no row \(rollouts: 11 filtered: in no pair"):
        rescore(tmp_path, made, outputs=["pairs"], min_gap=9.0)
