"""The whole loop over a sharded model, with a single process: resume, export, bad numbers, empty steps, rollouts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from artifacts.errors import StageError
from stages.sharding import Fsdp, Sharding, Whole, Zero
from stages.training import loop
from stages.training.held_out import HeldOut
from stages.training.language_modeling import TokenLoss
from stages.training.loop import Trained, Trainer
from stages.training.model import Scorer
from stages.training.objective import Window
from stages.training.processes import prepare_process
from stages.training.windows import DatasetWindows
from tests.training.conftest import tiny_model
from tests.training.test_loop import PoisonedLoss, Stop, StoppingWindows, context_for, sequences
from tests.training.test_parallel import WAYS

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(params=WAYS, ids=lambda way: way.name)
def way(request: pytest.FixtureRequest) -> Sharding:
    return request.param


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`launched(way)`: as if the launcher had said so."""

    def say(way: Sharding) -> None:
        monkeypatch.setattr(loop, "launched_sharding", lambda: way)

    return say


def trainer_for(folder: Path, objective: TokenLoss | None = None, **settings: Any) -> Trainer:
    context = context_for(folder, learning_rate=3e-3, checkpoint_steps=2, **settings)
    made = lambda: Scorer(tiny_model())  # noqa: E731 - said twice
    return Trainer(context, context.config, prepare_process(context), made(), objective or TokenLoss(), made)


def train(folder: Path, stop_before: int = -1, *, best: bool = False, apart: int = 0) -> Trained:
    trainer = trainer_for(folder)
    windows = StoppingWindows(sequences(), trainer.config)
    windows.stop_before = stop_before
    return trainer.run(windows, measured=HeldOut(sequences(3, seed=apart), every_steps=2, keeps_best=best))


def test_interrupted_and_exported(tmp_path: Path, launched: Any, way: Sharding) -> None:
    whole = train(tmp_path / "whole")
    launched(way)
    with pytest.raises(Stop):
        train(tmp_path / "sharded", 5)
    sharded = train(tmp_path / "sharded")
    for row, expected in zip(sharded.metrics, whole.metrics, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    for left, right in zip(sharded.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_the_best_weights_are_exported(tmp_path: Path, launched: Any, way: Sharding) -> None:
    """Those of the first of three measurements, which the resumed run has from its checkpoint."""
    whole = train(tmp_path / "whole", best=True, apart=2)
    measured = [row["eval/loss"] for row in whole.metrics if "eval/loss" in row]
    assert len(measured) == 3 and measured[0] + 0.03 < measured[1] < measured[2]
    launched(way)
    with pytest.raises(Stop):
        train(tmp_path / "sharded", 5, best=True, apart=2)
    sharded = train(tmp_path / "sharded", best=True, apart=2)
    for left, right in zip(sharded.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_numbers_that_are_none_name_their_row(tmp_path: Path, launched: Any, way: Sharding) -> None:
    launched(way)
    trainer = trainer_for(tmp_path, PoisonedLoss("row7"))
    windows = DatasetWindows(sequences(), trainer.config)
    with pytest.raises(StageError, match=r"loss nan.* rows row7\. This step changed no weights"):
        trainer.run(windows)


def test_a_step_without_gradient_still_moves_by_its_momentum(tmp_path: Path, launched: Any, way: Sharding) -> None:
    """Rollouts without signal are not computed; the step is the one that their zero gradients would give."""
    found = []
    for name, sharding in (("whole", Whole()), ("sharded", way)):
        launched(sharding)
        trainer = trainer_for(tmp_path / name)
        rows = [trainer.step(0, 4, Window(sequences())), trainer.step(1, 4, Window([], uncounted_items=8))]
        weights = {key: trainer.parallel.weight(key).clone() for key in trainer.parallel.shapes()}
        trainer.step(2, 4, Window([], uncounted_items=8))
        moved = sum(float((trainer.parallel.weight(key) - weights[key]).abs().sum()) for key in weights)
        found.append((rows, moved))
    (whole_rows, whole_moved), (sharded_rows, sharded_moved) = found
    assert sharded_moved == pytest.approx(whole_moved, rel=1e-3) and whole_moved > 0
    assert sharded_rows[1][0]["loss"] == sharded_rows[1][0]["grad_norm"] == 0.0
    assert sharded_rows[0][0] == pytest.approx(whole_rows[0][0], rel=1e-4)


@pytest.mark.parametrize("way", [Fsdp(), Zero(3)], ids=lambda way: way.name)
def test_rollouts_are_of_the_present_policy(tmp_path: Path, launched: Any, way: Sharding) -> None:
    """At every step the objective compares the sampler's log-probabilities with its own, and stops where they differ:
    a copy that is one step old would be 1e-2 off. What held-out prompts earn is by the weights after the step."""
    from transformers import AutoModelForCausalLM

    from tests.data.characters import build_tokenizer, ids
    from tests.stages.small_models import greedy, output, read_lines, run_stage, save_dataset, save_model

    save_model(tmp_path / "base", seed=3)
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "ba", "completion": "d"}]
    dataset = save_dataset(tmp_path / "rows", "prompt_completion", rows)
    (tmp_path / "reward.py").write_text(
        "def length(completions, **_):\n    return [len(one) / 4 for one in completions]\n"
    )
    settings = {
        "rewards": [f"{tmp_path}/reward.py:length"],
        "num_generations": 4,
        "train_batch_size": 8,
        "max_completion_length": 5,
        "learning_rate": 3e-2,
        "max_steps": 4,
        "eval_steps": 1,
    }
    apart = save_dataset(tmp_path / "apart", "prompt", [{"prompt": letter} for letter in "abcdefgh"])
    inputs = {"model": tmp_path / "base", "dataset": dataset, "eval_dataset": apart}
    found = []
    for name, sharding in (("whole", Whole()), ("sharded", way)):
        launched(sharding)
        context = run_stage("rl", tmp_path / name, inputs, **settings)
        found.append(read_lines(output(context, "model") / "metrics.jsonl"))
    whole, sharded = found
    assert sharded[:2] == [pytest.approx(row, rel=1e-3, abs=1e-5) for row in whole[:2]]
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-3 for row in sharded[1:])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output(context, "model")).eval(), build_tokenizer()
    said = [tokenizer.decode(greedy(model, ids(one), 5), skip_special_tokens=True) for one in "abcdefgh"]
    assert sharded[-1]["eval/reward"] == sum(len(text) / 4 for text in said) / 8
    assert len({row["eval/reward"] for row in sharded}) > 2
    assert sharded[-1]["loss"] != sharded[1]["loss"]


def test_a_value_model_is_sharded_with_the_policy(tmp_path: Path, launched: Any, way: Sharding) -> None:
    """The steps and the value model that is left are those of whole models."""
    from tests.stages.small_models import output, read_lines, run_stage, save_dataset, save_model

    save_model(tmp_path / "base", seed=3)
    save_model(tmp_path / "judge", seed=4, reward=True)
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "ba", "completion": "d"}]
    dataset = save_dataset(tmp_path / "rows", "prompt_completion", rows)
    inputs = {"model": tmp_path / "base", "dataset": dataset, "value_model": tmp_path / "judge"}
    settings = {
        "rewards": ["tests.stages.small_models:letters"],
        "train_batch_size": 2,
        "num_ppo_epochs": 2,
        "max_completion_length": 5,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-2,
        "value_learning_rate": 1e-2,
        "max_steps": 4,
        "save_value_model": True,
    }
    found = []
    for name, sharding in (("whole", Whole()), ("sharded", way)):
        launched(sharding)
        context = run_stage("ppo", tmp_path / name, inputs, **settings)
        weights = load_file(output(context, "value_model") / "model.safetensors")
        found.append((read_lines(output(context, "model") / "metrics.jsonl"), weights))
    (whole, critic), (sharded, of_shards) = found
    for left, right in zip(whole, sharded, strict=True):
        assert right == pytest.approx(left, rel=1e-3, abs=1e-5)
    assert of_shards.keys() == critic.keys()
    for name, weight in critic.items():
        torch.testing.assert_close(of_shards[name], weight, atol=1e-5, rtol=1e-4)
