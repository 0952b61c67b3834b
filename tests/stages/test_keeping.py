"""`keep: best` and `early_stopping_patience`: the weights of a run that was told to take no further step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages import sft
from stages.context import Context
from stages.training.held_out import HeldOut
from stages.training.keeping import Keeping
from tests.stages.small_models import logged, output, read_lines, run_stage, save_completions

ROWS = [("abc", "de"), ("da", "bbcaaa"), ("hgf", "e"), ("cab", "aabbcc")]
APART = [("abd", "de"), ("db", "bbcaab"), ("hga", "hh")]
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "train_batch_size": 2,
    "max_steps": 14,
    "eval_steps": 1,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_completions(tmp_path_factory.mktemp("inputs"), dataset=ROWS, eval_dataset=APART)


def losses(context: Context) -> list[float]:
    return [row["eval/loss"] for row in read_lines(output(context, "model") / "metrics.jsonl")]


def weights(context: Context) -> bytes:
    return (output(context, "model") / "model.safetensors").read_bytes()


@pytest.mark.parametrize("more", [{}, {"bf16": True}, {"lora_r": 2, "lora_dropout": 0.3}], ids=["", "bf16", "lora"])
def test_the_best_weights_are_those_of_a_run_that_ends_there(
    tmp_path: Path, inputs: dict[str, Path], more: dict[str, Any]
) -> None:
    kept = run_stage("sft", tmp_path / "kept", inputs, **SETTINGS, **more, keep="best")
    last = run_stage("sft", tmp_path / "last", inputs, **SETTINGS, **more)
    found = losses(kept)
    assert found == losses(last) and len(found) == 14
    best = found.index(min(found)) + 1
    assert 1 < best < 14
    ended = run_stage("sft", tmp_path / "ended", inputs, **SETTINGS | {"max_steps": best}, **more)
    assert weights(kept) == weights(ended) != weights(last)
    trained = [read_lines(output(one, "model") / "steps.jsonl") for one in (kept, ended, last)]
    assert trained[0] == trained[1] == trained[2][:best]
    assert kept.metrics["eval/loss"] == min(found) and kept.metrics["step"] == kept.counts["kept_step"] == best
    (said,) = [line for line in logged(Path(kept.spec.job)) if line.startswith("kept are")]
    assert said == f"kept are the weights of step {best}, with the lowest eval/loss: {min(found):.4g}"


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_run_ends_when_the_loss_has_not_fallen_for_long(tmp_path: Path, inputs: dict[str, Path], keep: str) -> None:
    found = losses(run_stage("sft", tmp_path / "whole", inputs, **SETTINGS))
    best = found.index(min(found)) + 1
    assert all(loss > found[best - 1] for loss in found[best : best + 2])
    stopped = run_stage("sft", tmp_path / "stopped", inputs, **SETTINGS, early_stopping_patience=2, keep=keep)
    assert losses(stopped) == found[: best + 2]
    last = {"max_steps": best if keep == "best" else best + 2}
    assert weights(stopped) == weights(run_stage("sft", tmp_path / "ended", inputs, **SETTINGS | last))
    (said,) = [line for line in logged(Path(stopped.spec.job)) if line.startswith("ends")]
    assert said == f"ends after step {best + 2} of 14: eval/loss has not fallen in 2 measurements"
    assert stopped.counts["ended_after_step"] == best + 2


def test_when_it_ends_by_hand(tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that only equals the lowest is no lower one, and what a checkpoint tells is what was seen."""
    context = run_stage("sft", tmp_path, inputs, **SETTINGS | {"max_steps": 1})
    rows = [{"step": step, "eval/loss": loss} for step, loss in ((2, 3.0), (4, 2.0), (6, 2.5), (8, 2.0), (10, 1.9))]
    parallel: Any = None
    seen: list[tuple[int, int, bool]] = []
    for count in range(1, 6):
        keeping = Keeping(context, HeldOut([], patience=2), parallel)
        keeping.load([{"step": 1}, *rows[: count - 1]], {})
        keeping.look({"step": 7})
        keeping.look(rows[count - 1])
        seen.append((keeping.step, keeping.since, keeping.ends(8, 20)))
    assert seen == [(2, 0, False), (4, 0, False), (4, 1, False), (4, 2, True), (10, 0, False)]


def test_settings_that_need_rows_apart() -> None:
    check: Any = sft.STAGE.check
    for settings, name in (
        ({"keep": "best"}, "keep: best"),
        ({"early_stopping_patience": 2}, "early_stopping_patience"),
    ):
        (said,) = check(sft.Config.model_validate(settings), frozenset({"model", "dataset"}))
        name = "keep: best" if "keep" in settings else "early_stopping_patience"
        assert said == f"{name} is given, but input eval_dataset is not wired, so it would not be used"
