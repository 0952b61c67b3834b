"""Training states in shares: whose tensors, which files, what a failure does, and that saving stands aside."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from artifacts import Checkpoints
from artifacts.errors import StageError, StoreError
from stages.context import Context
from stages.training import checkpoint
from stages.training.checkpoint import Progress, Saver, owners, restore
from stages.training.language_modeling import TokenLoss
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.processes import Processes, prepare_process
from stages.training.windows import DatasetWindows
from tests.training.conftest import tiny_model
from tests.training.test_loop import context_for, sequences

ALONE = Processes(0, 1, torch.device("cpu"))


@dataclass
class Tensors:
    """A spread-out model with nothing behind it."""

    held: dict[str, tuple[Tensor, dict[str, Tensor]]]
    lockstep: bool = False
    loads: list[tuple[str, int]] = field(default_factory=list)

    @classmethod
    def random(cls, seed: int = 0) -> Tensors:
        draws = torch.Generator().manual_seed(seed)
        shapes = {"wide": (7, 5), "tall": (6, 4), "bias": (3,), "norm": (2,)}
        held = {}
        for name, shape in shapes.items():
            weight, first, second = (torch.randn(shape, generator=draws) for _ in range(3))
            held[name] = (weight, {"exp_avg": first, "exp_avg_sq": second})
        return cls(held)

    def shapes(self) -> Mapping[str, torch.Size]:
        return {name: weight.shape for name, (weight, _) in self.held.items()}

    def weight(self, name: str) -> Tensor:
        return self.held[name][0]

    def moments(self, name: str) -> dict[str, Tensor]:
        return self.held[name][1]

    def load(self, name: str, weight: Tensor, moments: Mapping[str, Tensor], steps: int) -> None:
        self.loads.append((name, steps))
        self.held[name] = (weight, dict(moments))

    def loaded(self) -> None:
        self.loads.append(("all", -1))


@dataclass(frozen=True)
class Beside(Processes):
    """One of several processes that are threads of this one: what the first shares is kept for the others."""

    shared: list[Any] = field(default_factory=list)

    def share(self, value: Any) -> Any:
        if self.rank == 0:
            self.shared.append(value)
        return self.shared[-1]


def beside(count: int) -> list[Beside]:
    shared: list[Any] = []
    return [Beside(rank, count, torch.device("cpu"), shared) for rank in range(count)]


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.held.keys() == expected.held.keys()
    for name, (weight, moments) in found.held.items():
        assert torch.equal(weight, expected.held[name][0])
        assert moments.keys() == expected.held[name][1].keys()
        assert all(torch.equal(moments[key], expected.held[name][1][key]) for key in moments)


def copy_of(tensors: Tensors) -> Tensors:
    return Tensors({n: (w.clone(), {k: m.clone() for k, m in ms.items()}) for n, (w, ms) in tensors.held.items()})


def saved_by(context: Context, tensors: Tensors, count: int, step: int = 3) -> None:
    """Several processes save the same state together."""
    contexts = [Context(context.spec, context.store, rank=rank) for rank in range(count)]
    savers = [Saver(one, tensors, two, None) for one, two in zip(contexts, beside(count), strict=True)]
    for saver in savers:
        saver.save(Progress(step=step, num_tokens=11))
    for saver in savers:
        saver.background.wait()


def test_shares_are_balanced_largest_first() -> None:
    shapes = {"a": (10, 10), "b": (9, 10), "c": (8, 10), "d": (7, 10), "e": (1,)}
    assert owners({name: torch.Size(shape) for name, shape in shapes.items()}, 2) == {
        "a": 0,  # 100 : 0
        "b": 1,  # 100 : 90
        "c": 1,  # 100 : 170
        "d": 0,  # 170 : 170
        "e": 0,  # a tie goes to the first
    }


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_processes_writes_what_one_reads(tmp_path: Path, count: int) -> None:
    """With five processes and four tensors, one has nothing to write."""
    context, tensors = context_for(tmp_path), Tensors.random()
    saved_by(context, tensors, count)
    _, folder = context.checkpoints.latest()
    parts = sorted({path.parent.name for path in folder.rglob("*.safetensors")})
    assert len(parts) == count
    found = Tensors.random(seed=1)
    progress = restore(context, found, ALONE, {})
    assert (progress.step, progress.num_tokens, context.resumed_from) == (3, 11, 3)
    assert_equal(found, tensors)
    assert found.loads == [("wide", 3), ("tall", 3), ("bias", 3), ("norm", 3), ("all", -1)]


def test_several_processes_read_what_one_wrote(tmp_path: Path) -> None:
    context, tensors = context_for(tmp_path), Tensors.random()
    saved_by(context, tensors, 1)
    for one in beside(2):
        found = Tensors.random(seed=1)
        assert restore(Context(context.spec, context.store, rank=one.rank), found, one, {}).step == 3
        assert_equal(found, tensors)


def test_large_states_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 7 * 5 * 4)  # the widest tensor alone fills one
    context, tensors = context_for(tmp_path), Tensors.random()
    saved_by(context, tensors, 1)
    files = list(context.checkpoints.latest()[1].glob("state-*.safetensors"))
    assert len(files) > 4
    found = Tensors.random(seed=1)
    restore(context, found, ALONE, {})
    assert_equal(found, tensors)


def test_another_models_state_is_refused(tmp_path: Path) -> None:
    context, tensors = context_for(tmp_path), Tensors.random()
    saved_by(context, tensors, 1)
    found = Tensors.random()
    found.held["wide"] = (torch.zeros(5, 7), {})
    with pytest.raises(StageError, match=r"the checkpoint of step 3 in .* has no wide of shape \(5, 7\)"):
        restore(context, found, ALONE, {})


def gated(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Saving stands still before it writes: (has begun, may go on)."""
    begun, go_on, write = threading.Event(), threading.Event(), Checkpoints.save

    def save(self: Checkpoints, step: int, folder: Path) -> None:
        begun.set()
        assert go_on.wait(30)
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
    assert begun.wait(30)
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
    assert begun.wait(30)
    assert context.checkpoints.latest_step() is None and thread.is_alive()
    go_on.set()
    thread.join(30)
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
