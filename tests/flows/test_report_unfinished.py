"""The report of a run whose training failed: the steps that it logged, and the completions that it recorded last."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from artifacts import Store, open_store
from flows.report import render_report
from stages.training.metrics_log import METRICS
from tests.flows.test_report import Page, drawn, series_of
from tests.in_process import Payload, run_here
from tests.tiny_recipe import artifact_folder, metrics_of, write_recipe

CALLS = 5
"""Generations, of one step each, that are rewarded before the judge is gone."""
SAVED = 4
CODE = """
calls = 0


def judge(completions, **_):
    global calls
    calls += 1
    if calls > {most}:
        raise ValueError("the judge is gone")
    return [completion.count("1") + len(completion) / 8 for completion in completions]
"""
RL: dict[str, Any] = {
    "uses": "rl",
    "inputs": {"model": "base", "dataset": "rows"},
    "with": {
        "rewards": ["code.py:judge"],
        "max_steps": 7,
        "train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "learning_rate": 1e-3,
        "checkpoint_steps": SAVED,
    },
}


def run_rl(folder: Path, most: int) -> tuple[Store, Payload]:
    recipe = write_recipe(folder, {"rl": RL})
    (folder / "code.py").write_text(CODE.format(most=most))
    store = folder / "store"
    return open_store(str(store)), run_here(recipe, store, only=["rows", "base", "rl"])


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Payload]:
    return run_rl(tmp_path_factory.mktemp("failed"), CALLS)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """(metrics, rollouts) of the same run with a judge that stays."""
    import pyarrow.parquet

    store, payload = run_rl(tmp_path_factory.mktemp("whole"), 10**6)
    entry = payload["stages"]["rl"]
    folder = artifact_folder(store.url, entry["outputs"]["rollouts"]["id"])
    rollouts = [
        row for path in sorted(folder.glob("*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()
    ]
    return metrics_of(store.url, entry), rollouts


def page_of(store: Store, payload: Payload) -> Page:
    return Page(render_report(store, store.read_run(payload["run"])))


def test_the_curve_has_the_steps_that_were_logged(failed: Any, expected: Any) -> None:
    store, payload = failed
    page = page_of(store, payload)
    for metric in ("loss", "reward", "learning_rate"):
        assert series_of(page, metric) == {"rl": [[row["step"], drawn(row[metric])] for row in expected[0][:CALLS]]}
    assert f"failed: an unfinished stage, whose curves end with step {CALLS}, the last in its job folder" in page.text
    assert "It ended with:" in page.text and page.text.count("the judge is gone") >= 2
    assert page.all("g", "partial") and "rl (unfinished)" in page.text


def test_the_completions_of_the_last_generation(failed: Any, expected: Any) -> None:
    store, payload = failed
    page = page_of(store, payload)
    last = [row for row in expected[1] if row["step"] == CALLS]
    said = [data.strip() for data in page.texts]
    assert len(last) == 8
    for row in last:
        assert row["prompt"] in said and (row["completion"] in said or not row["completion"])
    assert "8 completions from training, of the last generation that it recorded" in page.text
    assert f"step {CALLS} ·" in page.text and f"step {CALLS - 1} ·" not in page.text


def test_on_another_machine_the_last_checkpoint_has_them(failed: Any, expected: Any, tmp_path: Path) -> None:
    """There is no job folder. Of the checkpoint one file is read, not the weights."""
    path = Path(failed[0].url.removeprefix("file://"))
    shutil.copytree(path, tmp_path / "store", ignore=shutil.ignore_patterns("scratch"))
    for weights in (tmp_path / "store").glob("work/*/checkpoints/*/*.safetensors"):
        weights.unlink()
    page = page_of(open_store(str(tmp_path / "store")), failed[1])
    assert series_of(page, "loss") == {"rl": [[row["step"], drawn(row["loss"])] for row in expected[0][:SAVED]]}
    assert f"end with step {SAVED}, the last in its last checkpoint in the store" in page.text


def test_where_nothing_was_kept_it_is_said(failed: Any, tmp_path: Path) -> None:
    path = Path(failed[0].url.removeprefix("file://"))
    shutil.copytree(path, tmp_path / "store", ignore=shutil.ignore_patterns("scratch", "work"))
    page = page_of(open_store(str(tmp_path / "store")), failed[1])
    assert series_of(page, "loss") == {}
    assert "no metrics of it were kept, neither in its job folder on this machine nor in a checkpoint" in page.text
    assert "rl: failed, and the store holds no completions that it sampled" in page.text


def test_a_line_that_was_cut_is_left_out(failed: Any, expected: Any, tmp_path: Path) -> None:
    """As of a stage that was killed while it wrote one."""
    path = Path(failed[0].url.removeprefix("file://"))
    shutil.copytree(path, tmp_path / "store")
    store, payload = open_store(str(tmp_path / "store")), failed[1]
    log = store.scratch / payload["run"] / "rl" / METRICS
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]) + '{"step": 3, "lo')
    page = _as_if(store, payload, "running", None)
    assert series_of(page, "loss") == {"rl": [[row["step"], drawn(row["loss"])] for row in expected[0][:2]]}
    assert "at work: an unfinished stage, whose curves end with step 2" in page.text
    assert "metrics.jsonl line 3 is not JSON and was left out" in page.text
    text = _as_if(store, payload, "interrupted", "the run was killed").text
    assert "interrupted: an unfinished stage" in text and "It ended with: the run was killed" in text


def _as_if(store: Store, payload: Payload, state: str, error: str | None) -> Page:
    entry = {**payload["stages"]["rl"], "state": state, "error": error}
    return Page(render_report(store, {**payload, "stages": {**payload["stages"], "rl": entry}}))
