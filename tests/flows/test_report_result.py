"""The first thing on the page: whether it worked, which model is best, and by how much, against numbers by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from flows.report import render_report
from flows.reporting.headline import read_headline
from flows.reporting.outcome import read_outcome
from flows.reporting.reading import Reader
from flows.reporting.scoreboard import Scoreboard, read_scoreboard
from flows.reporting.wiring import in_order, read_wiring
from tests.flows.report_run import SmallRun, jsonl
from tests.flows.test_report import page_of


def model(name: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Outputs of a stage that makes a model of its own."""
    return {"model": ("model", {"config.json": f'{{"name": "{name}"}}'})}


def evaluated(
    run: SmallRun, model: str, right: Sequence[bool], rows: Sequence[str] | None = None, **config: float
) -> None:
    """An evaluation of accuracy, a sample a row."""
    names = rows or [f"r-{index}" for index in range(len(right))]
    lines = [{"row_id": n, "prompt": n, "completion": n, "correct": ok} for n, ok in zip(names, right, strict=True)]
    accuracy = {"value": sum(right) / len(right), "low": 0.0, "high": 1.0, "n": len(right)}
    files = {"results.json": json.dumps({"accuracy": accuracy}), "samples.jsonl": jsonl(lines)}
    name = "_".join(["eval", model, *map(str, config)])
    run.stage(name, "evaluate", {"model": model, "dataset": "@rows"}, {"evaluation": ("evaluation", files)}, config)


def board_of(run: SmallRun) -> Scoreboard:
    payload = in_order(run.payload())
    wiring = read_wiring(payload)
    found = read_headline(payload, wiring, Reader(run.store)).measurements
    return read_scoreboard(payload, wiring, found, run.store)


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    """base -> sft -> merged (not evaluated) -> grpo; student learns from grpo."""
    run = SmallRun(tmp_path)
    run.stage("base", "init_model", {}, model("base"))
    run.stage("sft", "sft", {"model": "base"}, model("sft"))
    run.stage("merged", "merge_adapter", {"model": "sft"}, model("merged"))
    run.stage("grpo", "rl", {"model": "merged"}, model("grpo"))
    run.stage("small", "init_model", {}, model("small"))
    run.stage("student", "distill", {"model": "small", "teacher": "grpo"}, model("student"))
    return run


def test_models_are_compared_with_what_they_come_from(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 rows. grpo is right wherever sft is wrong and the other way round on none, so that every draw of rows has
    grpo ahead; the student is right on all but one row that grpo has right, which a third of the draws leave out."""
    evaluated(run, "base", [False] * 40)
    evaluated(run, "sft", [True] * 10 + [False] * 30)
    evaluated(run, "grpo", [True] * 40)
    evaluated(run, "student", [True] * 39 + [False])
    [column] = board_of(run).columns
    changes = {name: cell.change for name, cell in column.cells.items() if cell.change is not None}
    assert {name: (change.model, change.value, change.better) for name, change in changes.items()} == {
        "sft": ("base", 0.25, True),
        "grpo": ("sft", 0.75, True),  # the nearest that was evaluated
        "student": ("grpo", pytest.approx(-0.025), None),  # of the teacher, where there is no other; may be chance
    }
    grpo = changes["grpo"]
    assert grpo.low is not None and grpo.high is not None
    # 95 % of binomial(40, 3/4) / 40 lie between 24/40 and 35/40
    assert grpo.low == pytest.approx(24.5 / 40, abs=0.03) and grpo.high == pytest.approx(35 / 40, abs=0.03)
    assert changes["student"].high == 0 and changes["student"].low == pytest.approx(-3 / 40, abs=0.03)
    assert [cell.of.model for cell in column.best] == ["grpo"]
    assert [cell.of.model for cell in column.even] == ["student"]
    text = page_of(run).text
    assert re.search(r"grpo has the highest accuracy on @rows, 1 \[0, 1\] : \+0\.75 \[.*\] against sft", text)
    assert "Level with it, as far as these rows can tell: student 0.975" in text
    path = f"posttrain path {run.output('grpo').removeprefix('sha256:')[:10]}"
    assert f"{path} --store {run.store.url}" in text
    monkeypatch.setenv("POSTTRAIN_CACHE", str(run.folder))  # the command finds it by itself
    assert path in (text := page_of(run).text) and "--store" not in text


def test_what_was_not_measured_on_the_same_rows_has_no_interval(run: SmallRun) -> None:
    evaluated(run, "sft", [True, False], ["a", "b"])
    evaluated(run, "grpo", [True, True], ["a", "c"])
    evaluated(run, "base", [False] * 2, ["a", "b"], temperature=0.5)
    column, other = board_of(run).columns
    change = column.cells["grpo"].change
    assert change is not None and (change.value, change.low, change.better) == (0.5, None, None)
    assert change.text == "+0.5"
    # other settings, another column, which says so; alone in it nothing is best
    assert (column.note, other.note) == ("temperature 0.0", "temperature 0.5")
    assert list(other.cells) == ["base"] and not other.best


def test_samples_that_do_not_give_the_number_are_not_used(run: SmallRun) -> None:
    evaluated(run, "sft", [True, False])
    evaluated(run, "grpo", [True, True])
    stage = run.stages["eval_grpo"]
    files = {"results.json": json.dumps({"accuracy": {"value": 0.875}}), "samples.jsonl": jsonl([{"row_id": "r-0"}])}
    stage["outputs"] = {"evaluation": run.put("evaluation", files, "evaluate", {}).to_json()}
    change = board_of(run).columns[0].cells["grpo"].change
    assert change is not None and (change.value, change.low) == (0.375, None)


def test_less_of_a_loss_is_better(run: SmallRun) -> None:
    for model, losses in (("sft", [2.0, 3.0, 4.0] * 2), ("grpo", [1.0, 2.0, 3.0] * 2)):
        lines = [{"row_id": f"r-{i}", "loss": loss, "loss_tokens": 2} for i, loss in enumerate(losses)]
        results = {"loss": {"value": sum(losses) / 6}}
        files = {"results.json": json.dumps(results), "samples.jsonl": jsonl(lines)}
        run.stage(f"eval_{model}", "evaluate", {"model": model}, {"evaluation": ("evaluation", files)})
    [column] = board_of(run).columns
    change = column.cells["grpo"].change
    # one less in every row, and so in every draw of rows
    assert change is not None and change.better is True
    assert [change.value, change.low, change.high] == pytest.approx([-1, -1, -1])
    assert change.text == "−1 [−1, −1]" and column.best == (column.cells["grpo"],)


def test_how_it_ended_and_why_it_ran(run: SmallRun) -> None:
    run.stages["base"]["state"] = "cached"
    run.stages["sft"]["reasons"] = ["with.learning_rate: 1e-5 -> 2e-5"]
    run.stages["merged"]["reasons"] = ["input sft changed"]
    run.stages["grpo"] |= {"state": "failed", "error": "out of memory", "reasons": ["input merged changed"]}
    run.stages["student"] |= {"state": "skipped", "reasons": ["grpo failed"]}
    run.stages["small"] |= {"reasons": ["first run"]}
    found = read_outcome(run.payload())
    assert found.causes == (("with.learning_rate: 1e-5 -> 2e-5", ("sft",)), ("first run", ("small",)))
    assert found.followed == 2 and not found.well
    text = page_of(run).text
    assert "4 of 6 stages are done. Failed: grpo . Not begun: student ." in text
    assert "Once that is mended, run it again" in text and "out of memory" in text
    assert "with.learning_rate: 1e-5 -> 2e-5 ( sft ); first run ( small ); 2 more followed from these" in text


def test_an_interrupted_stage_did_not_fail(run: SmallRun) -> None:
    run.stages["grpo"] |= {"state": "interrupted", "error": "stopped because the run ended"}
    html = render_report(run.store, {**run.payload(), "state": "interrupted"})
    assert "Run it again: what is done stays" in html and "</a> failed" not in html


def test_a_model_from_outside_that_changed_is_a_cause(run: SmallRun) -> None:
    run.stages["sft"]["reasons"] = ["input model: 0a1b2c3d -> 9f8e7d6c"]
    run.stages["merged"]["reasons"] = ["input sft changed"]
    run.stages["grpo"]["reasons"] = ["inputs merged, base changed (sft did)"]
    run.stages["student"]["reasons"] = ["input grpo may change (sft will run)"]
    found = read_outcome(run.payload())
    assert found.causes[1] == ("input model: 0a1b2c3d -> 9f8e7d6c", ("sft",)) and found.followed == 3
    assert [reason for reason, _ in found.causes] == ["never ran before", "input model: 0a1b2c3d -> 9f8e7d6c"]


def test_what_was_not_asked_for_is_not_missing(run: SmallRun) -> None:
    why = "not selected by --only student"
    for name in ("base", "sft", "merged"):
        run.stages[name] |= {"state": "skipped", "reason": why, "reasons": [why]}
    run.stages["grpo"] |= {
        "state": "skipped",
        "reason": f"{why}; its result is taken",
        "reasons": [f"{why}; its result is taken", "done by run 1"],
    }
    found = read_outcome(run.payload())
    assert found.well and (found.asked, found.options) == (2, "--only student")
    text = page_of(run).text
    assert "All 2 stages that were asked for are done. Left out by --only student: base , sft , merged , grpo ." in text
    assert "Not begun" not in text
    run.stages["small"] |= {"state": "failed", "error": "out of memory"}
    run.stages["student"] |= {"state": "skipped", "reason": "small failed"}
    assert "0 of 2 stages are done. Failed: small . Not begun: student ." in page_of(run).text


def test_one_stage_is_not_all_stages(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    run.stage("base", "init_model", {}, model("base"))
    assert "The stage is done." in page_of(run).text
