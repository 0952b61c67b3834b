"""Which evaluations the report compares, and what it says of differences that may be chance, against counts by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.flows.report_run import SmallRun, jsonl
from tests.flows.test_report import page_of
from tests.flows.test_report_result import board_of, evaluated, model


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    """base -> sft -> grpo"""
    run = SmallRun(tmp_path)
    run.stage("base", "init_model", {}, model("base"))
    run.stage("sft", "sft", {"model": "base"}, model("sft"))
    run.stage("grpo", "rl", {"model": "sft"}, model("grpo"))
    return run


def scored(run: SmallRun, stage: str, scores: Sequence[float], metric: str = "reward", **inputs: str) -> None:
    """An evaluation by scores, a sample a row."""
    fields = [
        {"score": score} if metric == "reward" else {"chosen_score": score, "rejected_score": 0.0} for score in scores
    ]
    lines = [{"row_id": f"r-{index}", **found} for index, found in enumerate(fields)]
    value = sum(scores if metric == "reward" else [float(score > 0) for score in scores]) / len(scores)
    files = {"results.json": json.dumps({metric: {"value": value}}), "samples.jsonl": jsonl(lines)}
    run.stage(stage, "evaluate", {"dataset": "@rows", **inputs}, {"evaluation": ("evaluation", files)})


def test_numbers_of_two_judges_are_not_compared(run: SmallRun) -> None:
    """sft is better than base by one judge; the other one's numbers are five higher whatever it judges."""
    for name, judged, judge, off in (
        ("base_by_a", "base", "@a", 5.0),
        ("base_by_b", "base", "@b", 0.0),
        ("sft_by_b", "sft", "@b", 1.0),
    ):
        scored(run, name, [off + index / 10 for index in range(8)], model=judged, reward_model=judge)
        run.stages[name]["inputs"]["reward_model"] = [f"sha256:{judge[1:] * 64}"]
    by_b, by_a = board_of(run).columns
    assert (by_b.note, by_a.note) == ("reward_model @b", "reward_model @a")
    assert [cell.of.stage for cell in by_b.cells.values()] == ["base_by_b", "sft_by_b"]
    assert [cell.of.stage for cell in by_a.cells.values()] == ["base_by_a"]
    assert [cell.of.model for cell in by_b.best] == ["sft"]


def test_no_evaluation_hides_another_of_the_same_model(run: SmallRun) -> None:
    """A policy, which has a reference, stands beside a reward model, which has none; only where one model was measured
    with and without are there two columns, and one that was measured twice alike has one for each."""
    scored(run, "eval_grpo", [1.0] * 8, "preference/accuracy", model="grpo", reference="base")
    scored(run, "eval_sft", [1.0] * 4 + [-1.0] * 4, "preference/accuracy", model="sft")
    [column] = board_of(run).columns
    assert (list(column.cells), column.note) == (["grpo", "sft"], "")
    scored(run, "bare_grpo", [1.0] * 2 + [-1.0] * 6, "preference/accuracy", model="grpo")
    bare, referred = board_of(run).columns
    assert [cell.of.stage for cell in bare.cells.values()] == ["eval_sft", "bare_grpo"]
    assert [cell.of.stage for cell in referred.cells.values()] == ["eval_grpo"]
    assert (bare.note, referred.note) == ("no reference", "reference base")
    scored(run, "again_grpo", [1.0] * 3 + [-1.0] * 5, "preference/accuracy", model="grpo")
    notes = {column.note: [cell.of.stage for cell in column.cells.values()] for column in board_of(run).columns}
    assert notes["no reference, by again_grpo"] == ["again_grpo"] and len(notes) == 3


def test_settings_that_cannot_change_a_number_part_no_columns(run: SmallRun) -> None:
    evaluated(run, "base", [False] * 8, micro_batch_tokens=4096)
    evaluated(run, "sft", [True] * 8, temperature=0.0)
    evaluated(run, "grpo", [True] * 8)
    [column] = board_of(run).columns
    assert (list(column.cells), column.note) == (["base", "sft", "grpo"], "")


def test_equal_ones_are_best_together(run: SmallRun) -> None:
    evaluated(run, "base", [False] * 8)
    evaluated(run, "sft", [True] * 6 + [False] * 2)
    evaluated(run, "grpo", [False] * 2 + [True] * 6)
    [column] = board_of(run).columns
    assert [cell.of.model for cell in column.best] == ["sft", "grpo"]
    assert re.search(r"sft and grpo share the highest accuracy on @rows, 0\.75 ?\.", page_of(run).text)


def test_rows_that_one_of_them_lacks_do_not_stand_in_the_way(run: SmallRun) -> None:
    """The last of 20 rows was lost under grpo, which is right on 19 and so 9 better over them."""
    evaluated(run, "sft", [True] * 10 + [False] * 10)
    evaluated(run, "grpo", [True] * 19)
    change = board_of(run).columns[0].cells["grpo"].change
    assert change is not None and (change.rows, change.of, change.better) == (19, 20, True)
    assert change.value == pytest.approx(9 / 19) and change.low is not None
    assert change.text.endswith("] over 19 of 20 rows")


def test_where_rows_cannot_be_paired_intervals_that_overlap_are_level(run: SmallRun) -> None:
    for name, value, low, high in (("base", 0.2, 0.1, 0.3), ("sft", 0.5, 0.4, 0.6), ("grpo", 0.7, 0.55, 0.8)):
        files = {"results.json": json.dumps({"accuracy": {"value": value, "low": low, "high": high}})}
        inputs = {"model": name, "dataset": "@rows"}
        run.stage(f"eval_{name}", "evaluate", inputs, {"evaluation": ("evaluation", files)})
    [column] = board_of(run).columns
    assert [cell.of.model for cell in column.even] == ["sft"]


@pytest.mark.parametrize(("rows", "better"), [(1, None), (3, None), (5, None), (6, True)])
def test_a_few_rows_that_all_agree_may_be_chance(run: SmallRun, rows: int, better: bool | None) -> None:
    """Heads at every of n tosses: 1 in 2^n, less than a 40th from 6 on."""
    evaluated(run, "base", [False] * rows)
    evaluated(run, "sft", [True] * rows)
    [column] = board_of(run).columns
    change = column.cells["sft"].change
    assert change is not None and change.better is better
    assert (change.low is None) == (rows < 6)
    assert bool(column.even) == (better is None)
    assert ("better than base" in page_of(run).text) == (better is True)


def test_five_of_many_rows_may_be_chance_too(run: SmallRun) -> None:
    """The bootstrap leaves all five out in 1 of 148 draws and so ends above 0; of five tosses 1 in 32 are all heads."""
    evaluated(run, "base", [False] * 500)
    evaluated(run, "sft", [True] * 5 + [False] * 495)
    change = board_of(run).columns[0].cells["sft"].change
    assert change is not None and change.low is not None and change.low > 0 and change.better is None


def test_samples_of_another_tool_are_not_read_as_ours(run: SmallRun) -> None:
    for name in ("sft", "grpo"):
        files = {
            "results.json": json.dumps({"loss": {"value": 1.0}}),
            "samples.jsonl": jsonl([{"row_id": "r", "loss": 1.0}]),
        }
        run.stage(f"eval_{name}", "evaluate", {"model": name}, {"evaluation": ("evaluation", files)})
    assert [cell.of.model for cell in board_of(run).columns[0].best] == ["sft", "grpo"]


def test_a_model_from_outside_has_no_folder_in_the_store(run: SmallRun) -> None:
    evaluated(run, "sft", [False] * 8)
    files = {"results.json": json.dumps({"accuracy": {"value": 1.0}})}
    run.stage(
        "eval_hub", "evaluate", {"model": "owner/name", "dataset": "@rows"}, {"evaluation": ("evaluation", files)}
    )
    text = page_of(run).text
    assert "owner/name has the highest accuracy" in text and "posttrain path" not in text
