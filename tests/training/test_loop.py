"""The loop's promises: one gradient however a step is cut, and the same bits after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from artifacts.errors import StageError
from stages.context import Context, local_context
from stages.sft import Config
from stages.training.batch import Branch, Group
from stages.training.language_modeling import TokenLoss
from stages.training.loop import Trainer
from stages.training.metrics import Mean
from stages.training.model import Scorer
from stages.training.processes import prepare_process
from stages.training.windows import DatasetWindows
from tests.training.conftest import packing_scorer, random_groups, tiny_model

OTHERS = ("adamw_8bit", "adafactor", "muon")
"""Of `optim`, beside adamw."""


class Stop(Exception):
    """Stands for a kill between two steps."""


class StoppingWindows(DatasetWindows):
    """Raises instead of giving the window of one step."""

    stop_before = -1

    def window(self, step: int) -> Any:
        if step == self.stop_before:
            raise Stop
        return super().window(step)


def context_for(folder: Path, **settings: object) -> Context:
    folder.mkdir(exist_ok=True)
    defaults: dict[str, object] = {"learning_rate": 1e-2, "train_batch_size": 8, "max_steps": 6, "seed": 3}
    inputs: dict[str, Any] = {name: _folder(folder / name) for name in ("model", "dataset")}
    return local_context("sft", Config(**(defaults | settings)), folder=folder, inputs=inputs)


def _folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    (path / "content").write_text(path.name)
    return path


def sequences(count: int = 12, seed: int = 0) -> list[Group]:
    """Whole sequences of which all but the first token are trained."""
    groups = random_groups(count, 1, prefix=(1, 2), seed=seed)
    rows = []
    for group in groups:
        ids = [*group.prefix_ids, *group.branches[0].token_ids]
        rows.append(Group(group.row_id, (), (Branch(ids, [False] + [True] * (len(ids) - 1)),)))
    return rows


def train(context: Context, groups: list[Group], stop_before: int = -1) -> tuple[Scorer, list[dict[str, float]]]:
    scorer = packing_scorer(tiny_model())
    trainer = Trainer(context, context.config, prepare_process(context), scorer, TokenLoss())
    windows = StoppingWindows(groups, context.config)
    windows.stop_before = stop_before
    return scorer, trainer.run(windows).metrics


def test_first_step_equals_plain_torch(tmp_path: Path) -> None:
    """Loss, gradient norm and the updated weights against transformers' loss and torch's AdamW."""
    context = context_for(tmp_path, max_steps=1, train_batch_size=12, max_grad_norm=1.0, weight_decay=0.1)
    groups = sequences()
    scorer, metrics = train(context, groups)

    model = tiny_model()
    total = sum(len(group.branches[0].token_ids) - 1 for group in groups)
    loss = torch.zeros(())
    for group in groups:
        ids = torch.tensor([list(group.branches[0].token_ids)])
        logits = model(input_ids=ids).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    (loss / total).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2
    ).step()

    assert metrics[0]["loss"] == pytest.approx(float(loss) / total, rel=1e-5)
    assert metrics[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    for ours, theirs in zip(scorer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_micro_batches_do_not_change_the_gradient(tmp_path: Path) -> None:
    """8 rows at once, and one by one (a budget of one token): loss and gradient norm of every step."""
    groups = sequences()
    _, at_once = train(context_for(tmp_path / "a", micro_batch_tokens=10_000), groups)
    _, one_by_one = train(context_for(tmp_path / "b", micro_batch_tokens=1), groups)
    assert len(at_once) == 6
    for left, right in zip(at_once, one_by_one, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-5)
        assert left["num_tokens"] == right["num_tokens"]


@pytest.mark.parametrize(
    ("stop_before", "optim"), [(1, "adamw"), (3, "adamw"), (4, "adamw"), (5, "adamw"), *((3, name) for name in OTHERS)]
)
def test_resume_gives_the_same_bits(tmp_path: Path, stop_before: int, optim: str) -> None:
    groups = sequences()
    settings: dict[str, object] = {"checkpoint_steps": 2, "optim": optim}
    whole, expected = train(context_for(tmp_path / "whole", **settings), groups)
    interrupted = tmp_path / "interrupted"
    with pytest.raises(Stop):
        train(context_for(interrupted, **settings), groups, stop_before)
    context = context_for(interrupted, **settings)
    resumed, metrics = train(context, groups)
    assert context.resumed_from == (stop_before // 2 * 2 or None)
    assert metrics == expected
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_nan_stops_before_the_weights_and_names_the_row(tmp_path: Path) -> None:
    groups = sequences()
    scorer = packing_scorer(tiny_model())
    context = context_for(tmp_path)
    trainer = Trainer(context, context.config, prepare_process(context), scorer, PoisonedLoss("row7"))
    before = [parameter.clone() for parameter in scorer.model.parameters()]
    windows = DatasetWindows(groups, context.config)
    steps = [step for step in range(6) if any(group.row_id == "row7" for group in windows.window(step).groups)]
    with pytest.raises(StageError, match=rf"step {steps[0] + 1}: loss nan.* rows row7\."):
        trainer.run(windows)
    if steps[0] == 0:
        for left, right in zip(before, scorer.model.parameters(), strict=True):
            assert torch.equal(left, right)


class PoisonedLoss(TokenLoss):
    """One row's loss is NaN."""

    def __init__(self, row_id: str) -> None:
        super().__init__()
        self.row_id = row_id

    def __call__(self, forward: Any, batch: Any) -> Any:
        loss, metrics = super().__call__(forward, batch)
        return (loss * float("nan") if self.row_id in batch.row_ids else loss), metrics


def test_every_row_once_an_epoch(tmp_path: Path) -> None:
    context = context_for(tmp_path, max_steps=None, num_train_epochs=2, train_batch_size=5)
    windows = DatasetWindows(sequences(12), context.config)
    assert windows.total_steps == 5  # 24 rows in steps of 5
    seen = [group.row_id for step in range(5) for group in windows.window(step).groups]
    assert len(seen) == 24
    assert sorted(seen[:12]) == sorted(seen[12:]) == sorted(f"row{i}" for i in range(12))
    assert seen[:12] != seen[12:]


def test_a_step_without_anything_to_learn_is_an_error(tmp_path: Path) -> None:
    groups = [Group("a", (), (Branch([5, 6], [False, False]),))]
    with pytest.raises(StageError, match="step 1 has nothing to learn from"):
        train(context_for(tmp_path, max_steps=1), groups)


class Waits(TorchDispatchMode):
    """Counts the operations by which the host waits for the device to learn a number."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class Direct(TokenLoss):
    """A loss of a weight itself, with metrics on the device: nothing in it waits."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def __call__(self, forward: Any, batch: Any) -> Any:
        loss = self.weight.square().sum()
        return loss, {"entropy": Mean(loss.detach(), torch.ones(())), "mean_token_accuracy": Mean(loss.detach(), 3)}


def test_a_step_does_not_wait_for_the_device_but_at_its_end(tmp_path: Path) -> None:
    """Losses, metrics, the norm and the decision to save come to the host together (one `tolist`)."""
    scorer = Scorer(tiny_model())
    context = context_for(tmp_path, micro_batch_tokens=8)
    objective = Direct(next(scorer.parameters()))
    trainer = Trainer(context, context.config, prepare_process(context), scorer, objective)
    with Waits() as waits:
        row, _ = trainer.step(1, 6, DatasetWindows(sequences(), context.config).window(0))
    assert waits.count == 0
    assert row["loss"] > 0 and row["mean_token_accuracy"] * 3 == pytest.approx(row["entropy"], rel=1e-6)
