"""Saving beside the steps: what is written is the state of its step, and what goes wrong comes up in the loop."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from artifacts import Checkpoints
from artifacts.errors import StoreError
from stages.context import Context
from stages.training import checkpoint
from stages.training.checkpoint import Progress, Saver, restore
from stages.training.language_modeling import TokenLoss
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.processes import prepare_process
from stages.training.windows import DatasetWindows
from tests.training.conftest import tiny_model
from tests.training.test_checkpoint import ALONE, Tensors, assert_equal
from tests.training.test_loop import context_for, sequences
from tests.waiting import LIMIT_SECONDS


def copy_of(tensors: Tensors) -> Tensors:
    return Tensors({n: (w.clone(), {k: m.clone() for k, m in ms.items()}) for n, (w, ms) in tensors.held.items()})


def gated(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Saving stands still before it writes: (has begun, may go on)."""
    begun, go_on, write = threading.Event(), threading.Event(), Checkpoints.save

    def save(self: Checkpoints, step: int, folder: Path) -> None:
        begun.set()
        assert go_on.wait(LIMIT_SECONDS)
        write(self, step, folder)

    monkeypatch.setattr(Checkpoints, "save", save)
    return begun, go_on


def test_what_is_saved_is_the_state_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while it is written; the file has what was there before."""
    begun, go_on = gated(monkeypatch)
    context, tensors = context_for(tmp_path), Tensors.random()
    before, progress = copy_of(tensors), Progress(step=3, metrics=[{"step": 3}], rows=[{"step": 3}])
    saver = Saver(context, tensors, ALONE, None)
    saver.save(progress)
    assert begun.wait(LIMIT_SECONDS)
    assert saver.wishes() == [0.0, 1.0]  # this one is busy
    for weight, moments in tensors.held.values():
        weight.zero_()
        moments["exp_avg"].add_(1)
    progress.step, progress.num_tokens = 4, 99
    progress.metrics.append({"step": 4})
    progress.rows.append({"step": 4})
    go_on.set()
    saver.background.wait()
    found = Tensors.random(seed=1)
    restored = restore(context, found, ALONE, {})
    assert_equal(found, before)
    assert (restored.step, restored.num_tokens) == (3, 0)
    assert restored.metrics == [{"step": 3}] and restored.rows == [{"step": 3}]


def fail(*_: object) -> None:
    raise StoreError("cannot store: the disk is full")


def run(context: Context) -> None:
    trainer = Trainer(context, context.config, prepare_process(context), Scorer(tiny_model()), TokenLoss())
    trainer.run(DatasetWindows(sequences(), context.config))


@pytest.mark.parametrize("steps", [2, 5])
def test_a_failed_save_stops_the_run_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """In the middle of the six steps, and at their end."""
    monkeypatch.setattr(Checkpoints, "save", fail)
    with pytest.raises(StoreError, match="the disk is full"):
        run(context_for(tmp_path, checkpoint_steps=steps))


def test_the_end_of_a_run_waits_for_its_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = gated(monkeypatch)
    context = context_for(tmp_path, checkpoint_steps=5)
    thread = threading.Thread(target=run, args=(context,))
    thread.start()
    assert begun.wait(LIMIT_SECONDS)
    assert context.checkpoints.latest_step() is None and thread.is_alive()
    go_on.set()
    thread.join(LIMIT_SECONDS)
    assert not thread.is_alive() and context.checkpoints.latest_step() == 5


@pytest.mark.parametrize(
    ("steps", "agreed", "due"),
    [(4, (0.0, 0.0), True), (3, (1.0, 0.0), False), (None, (1.0, 0.0), True), (None, (1.0, 1.0), False)],
)
def test_when_to_save(tmp_path: Path, steps: int | None, agreed: tuple[float, float], due: bool) -> None:
    """After every so many steps; or when the first process wants to and nobody is still writing."""
    saver = Saver(context_for(tmp_path), Tensors.random(), ALONE, steps)
    saver.agreed = agreed
    assert saver.is_due(8) is due


def test_automatic_saves_take_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    saver = Saver(context_for(tmp_path), Tensors.random(), ALONE, None)
    saver._copying_seconds, saver._writing_seconds = 2.0, 5.0  # 20 x 2 s is more than 5 x 5 s
    now = 1039.0
    assert saver.wishes() == [0.0, 0.0]
    now = 1041.0
    assert saver.wishes() == [1.0, 0.0]


def test_bfloat16_resumes_from_its_masters(tmp_path: Path) -> None:
    """The same bits as without the interruption, which rounded weights would not give."""

    def train(folder: Path, stop_after: int | None) -> list[dict[str, float]]:
        context = context_for(folder, bf16=True, checkpoint_steps=2)
        windows = DatasetWindows(sequences(), context.config)
        trainer = Trainer(
            context,
            context.config,
            prepare_process(context),
            Scorer(tiny_model()),
            TokenLoss(),
            lambda: Scorer(tiny_model()),
        )
        if stop_after is not None:
            windows.total_steps = stop_after  # ends early, and leaves its checkpoints
            total, step = 6, trainer.step
            trainer.step = lambda at, _, window: step(at, total, window)  # type: ignore[method-assign]
        trained = trainer.run(windows)
        assert all(parameter.dtype == torch.float32 for parameter in trained.model.parameters())
        return trained.metrics

    expected = train(tmp_path / "whole", None)
    train(tmp_path / "cut", 5)
    assert train(tmp_path / "cut", None) == expected
