"""What monitors notice while a run goes on: said in its log at the step where it is, and an end where asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from artifacts.errors import StageError
from stages.context import Context
from stages.training.language_modeling import TokenLoss
from stages.training.loop import Trainer
from stages.training.processes import prepare_process
from stages.training.windows import DatasetWindows
from tests.stages.small_models import output, read_json, run_stage, save_dataset, save_model
from tests.training.conftest import packing_scorer, tiny_model
from tests.training.test_loop import context_for, sequences

SPIKE = 24
"""The step whose rows lose ten times as much."""


class Spiking(TokenLoss):
    """Counts steps by its calls: every step is one micro-batch here."""

    calls = 0

    def __call__(self, forward: Any, batch: Any) -> Any:
        loss, metrics = super().__call__(forward, batch)
        self.calls += 1
        return loss * (10.0 if self.calls == SPIKE else 1.0), metrics


def train(folder: Path, **settings: Any) -> Context:
    context = context_for(folder, max_steps=30, train_batch_size=12, learning_rate=1e-5, **settings)
    trainer = Trainer(context, context.config, prepare_process(context), packing_scorer(tiny_model()), Spiking())
    trainer.run(DatasetWindows(sequences(), context.config), {"used": 12, "masked": 1})
    return context


def said(folder: Path) -> list[str]:
    """The lines for people."""
    events = [json.loads(line) for line in (folder / "job" / "events.jsonl").read_text().splitlines()]
    return [event["text"] for event in events if event["kind"] == "log"]


def test_a_spike_is_said_at_its_step(tmp_path: Path) -> None:
    train(tmp_path)
    dropped, rows, spike = said(tmp_path)
    assert dropped == "13 rows: 12 used; 1 dropped: masked"
    assert rows.startswith("step 0: masked_rows: 1 masked of 13 rows: nothing of them is trained")
    assert spike.startswith(f"step {SPIKE}: loss_spike: loss ") and "lower learning_rate" in spike


@pytest.mark.parametrize(("monitor", "step"), [("loss_spike", SPIKE), ("masked_rows", 0)])
def test_stop_on(tmp_path: Path, monitor: str, step: int) -> None:
    """The run ends with what was noticed; the states before it are kept."""
    with pytest.raises(StageError, match=rf"step {step}: {monitor}: .*\(stop_on names {monitor}\)"):
        train(tmp_path, stop_on=[monitor], checkpoint_steps=10)
    kept = context_for(tmp_path, max_steps=30, train_batch_size=12, learning_rate=1e-5).checkpoints.latest_step()
    assert kept == (20 if step else None)


def test_rows_that_a_stage_could_not_train(tmp_path: Path) -> None:
    """A prompt that fills max_length leaves nothing of its row: in the stage's ledger, and noticed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    save_model(tmp_path / "model", seed=1)
    rows = [{"prompt": "abc", "completion": "de"}, {"prompt": "abcdefgh", "completion": "e"}]
    dataset = save_dataset(tmp_path / "rows", "prompt_completion", rows)
    inputs = {"model": tmp_path / "model", "dataset": dataset}
    context = run_stage("sft", tmp_path / "run", inputs, max_length=7, max_steps=1, train_batch_size=1)
    assert read_json(output(context, "model") / "ledger.json")["states"] == {"masked": 1, "used": 1}
    assert any(line.startswith("step 0: masked_rows: 1 masked of 2 rows") for line in said(tmp_path / "run"))
