"""Which rows the filters above the samples find, and how columns and lines are told apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from flows.report import render_report
from tests.flows.report_run import SmallRun, jsonl
from tests.flows.test_report import page_of
from tests.flows.test_report_result import model


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    """base -> sft"""
    run = SmallRun(tmp_path)
    run.stage("base", "init_model", {}, model("base"))
    run.stage("sft", "sft", {"model": "base"}, model("sft"))
    return run


def sampled(run: SmallRun, stage: str, of: str, rows: dict[str, Sequence[bool]]) -> None:
    """An evaluation of several answers a row."""
    lines = [
        {"row_id": row, "prompt": row, "completion": "abcd"[at], "correct": right}
        for row, verdicts in rows.items()
        for at, right in enumerate(verdicts)
    ]
    inputs = {"model": of, "dataset": "@rows"}
    run.stage(stage, "evaluate", inputs, {"evaluation": ("evaluation", {"samples.jsonl": jsonl(lines)})})


def test_the_order_of_answers_is_no_difference(run: SmallRun) -> None:
    sampled(run, "eval_base", "base", {"alike": [True, False], "all": [True] * 2, "not": [True, False]})
    sampled(run, "eval_sft", "sft", {"alike": [False, True], "all": [True], "not": [False] * 2})
    cards = page_of(run).all("article", "sample")
    changed = [card["data-row"] for card in cards if "data-changed" in card]
    assert changed == ["not"]


def test_rows_that_have_numbers_only_have_no_filter_of_differences(run: SmallRun) -> None:
    for name, loss in (("base", 1.0), ("sft", 2.0)):
        files = {"samples.jsonl": jsonl([{"row_id": "r", "prompt": "p", "loss": loss, "loss_tokens": 2}])}
        inputs = {"model": name, "dataset": "@rows"}
        run.stage(f"eval_{name}", "evaluate", inputs, {"evaluation": ("evaluation", files)})
    html = render_report(run.store, run.payload())
    assert 'data-filter="all"' in html and 'data-filter="changed"' not in html
    assert not any("data-changed" in card for card in page_of(run).all("article", "sample"))


def test_two_evaluations_of_one_model_are_told_apart(run: SmallRun) -> None:
    sampled(run, "cold", "sft", {"r": [True]})
    sampled(run, "warm", "sft", {"r": [False]})
    sampled(run, "first", "base", {"r": [False]})
    html = render_report(run.store, run.payload())
    buttons = re.findall(r'<button type="button" data-filter="\d"[^>]*>([^<]*)</button>', html)
    assert buttons == ["sft (cold) 0", "sft (warm) 1", "base 1"]


def test_lines_of_a_chart_have_colours_of_their_own(run: SmallRun) -> None:
    """Of two stages of a kind the second comes eight later, which is as many as there are colours."""
    for index in range(9):
        uses = "sft" if index in (0, 8) else "preference"
        rows = jsonl([{"step": step, "loss": index + 1 / step} for step in range(1, 4)])
        run.stage(f"stage_{index}", uses, {"model": "base"}, {"model": ("model", {"metrics.jsonl": rows})})
    html = render_report(run.store, run.payload())
    colours = {name: colour for colour, name in re.findall(r'<g class="line (c\d)[^"]*" data-run="(stage_\d)"', html)}
    assert len(colours) == 9 and colours["stage_0"] != colours["stage_8"]
    assert len({colours[f"stage_{index}"] for index in range(1, 8)}) == 7
