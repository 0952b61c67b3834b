"""Updates on recorded rollouts: the run that recorded them again, the same losses turned round, and nothing sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.testing import assert_close

from artifacts.errors import DataError, StageError
from stages.context import Context, local_context
from stages.rl import Config, check
from stages.rollouts.recorded import read_recorded
from stages.rollouts.rewards import RewardSet
from stages.training.generation import Sampling
from stages.training.loop import Trainer
from stages.training.replaying import Replaying
from stages.training.rollout_plan import Plan
from tests.data.characters import IDS
from tests.stages.interruptions import killed_in
from tests.stages.small_models import output, read_lines, rows_of, run_stage, save_dataset, save_model

RUN: dict[str, Any] = {
    "learning_rate": 1e-3,
    "train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 5,
    "max_steps": 6,
    "checkpoint_steps": 2,
}
PROMPTS = ("abc", "da", "hgf", "cab")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, and the rollouts of a run that trained it into `trained`."""
    folder = tmp_path_factory.mktemp("made")
    AcceleratorState._reset_state(reset_partial_state=True)
    save_model(folder / "model", seed=1)
    dataset = save_dataset(folder / "rows", "prompt", [{"prompt": prompt} for prompt in PROMPTS])
    rewards = {"rewards": ["tests.stages.small_models:letters"]}
    context = run_stage("rl", folder / "run", {"model": folder / "model", "dataset": dataset}, **RUN, **rewards)
    return {
        "model": folder / "model",
        "dataset": dataset,
        "rollouts": output(context, "rollouts"),
        "trained": output(context, "model"),
    }


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever samples or rewards fails."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is to be generated or scored")

    monkeypatch.setattr(Sampling, "__call__", never)
    monkeypatch.setattr(RewardSet, "__init__", never)


def replay_in(folder: Path, made: dict[str, Path], rollouts: Path, **settings: Any) -> Context:
    AcceleratorState._reset_state(reset_partial_state=True)
    return local_context("rl", RUN | settings, folder=folder, inputs={"model": made["model"], "rollouts": rollouts})


def replay(folder: Path, made: dict[str, Path], rollouts: Path, **settings: Any) -> Context:
    context = replay_in(folder, made, rollouts, **settings)
    context.stage.run(context)
    return context


def metrics(folder: Path) -> list[dict[str, float]]:
    return read_lines(folder / "metrics.jsonl")


@pytest.mark.usefixtures("no_sampling")
def test_a_run_again_without_sampling(tmp_path: Path, made: dict[str, Path]) -> None:
    """The same model meets the same completions: every ratio is 1 to rounding, so losses and weights are the same."""
    context = replay(tmp_path, made, made["rollouts"])
    before, now = metrics(made["trained"]), metrics(output(context, "model"))
    assert len(now) == len(before) == 6
    for old, new in zip(before, now, strict=True):
        assert new["loss"] == pytest.approx(old["loss"], abs=1e-5)
        assert new["grad_norm"] == pytest.approx(old["grad_norm"], rel=1e-3)
        assert (new["reward"], new["rewards/letters/std"]) == (old["reward"], old["rewards/letters/std"])
        assert new["clip_ratio/low_mean"] == new["clip_ratio/high_mean"] == 0.0
    folders = (output(context, "model"), made["trained"], made["model"])
    weights, expected, start = (load_file(folder / "model.safetensors") for folder in folders)
    moved = max(float((expected[name] - start[name]).abs().max()) for name in expected)
    for name in expected:
        assert_close(weights[name], expected[name], atol=1e-2 * moved, rtol=0)
    recorded, again = rows_of(made["rollouts"]), rows_of(output(context, "rollouts"))
    for row in (*recorded, *again):
        row["advantage"] = pytest.approx(row["advantage"], abs=1e-6)
    assert again == recorded


def test_rewards_turned_round(tmp_path: Path, made: dict[str, Path]) -> None:
    """Scored again by the negative of what they were, the same rollouts pull the other way: at the first step, with all
    ratios at 1, the loss has the other sign and the gradient the same length."""
    turned = run_stage("rescore", tmp_path / "turned", {"rollouts": made["rollouts"]}, reward_weights={"letters": -1.0})
    context = replay(tmp_path / "run", made, output(turned, "rollouts"), max_steps=1)
    (now,), (before, *_) = metrics(output(context, "model")), metrics(made["trained"])
    assert now["reward"] == -before["reward"]
    assert now["loss"] == pytest.approx(-before["loss"], abs=1e-6) and abs(before["loss"]) > 1e-4
    assert now["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)


def test_groups_come_in_their_order_and_again(made: dict[str, Path]) -> None:
    """Six steps of two groups were recorded; generations of two steps take four, the fourth begins anew."""
    from stages.data.dataset import read_dataset

    recorded = read_recorded(read_dataset(made["rollouts"]))
    plan = Plan(2, 4, 2, 1, mask_truncated=False, seed=0, epochs=2.0, max_steps=None)
    replaying = Replaying(recorded, plan)
    assert len(replaying) == 12 and plan.total_steps(12) == 12
    steps = [[(entry.prompt.row_id, entry.weight_version) for entry in replaying.draw(g)[0]] for g in (0, 2, 3)]
    rows = rows_of(made["rollouts"])
    groups = [(rows[4 * place]["prompt_row_id"], rows[4 * place]["step"] - 1) for place in range(12)]
    assert steps == [groups[:4], groups[8:], groups[:4]]
    kept, replaced = replaying.draw(0)
    assert replaced == [] and kept[1].completions[2].token_ids == rows[6]["token_ids"]
    assert kept[1].rewards == {"letters": [row["reward_letters"] for row in rows[4:8]]}


@pytest.mark.usefixtures("no_sampling")
def test_a_killed_replay(tmp_path: Path, made: dict[str, Path]) -> None:
    """Steps that use a generation twice, killed in the fourth of six: the bytes of a whole run."""
    settings = {"num_iterations": 2, "steps_per_generation": 2, "beta": 0.1}
    whole = replay(tmp_path / "whole", made, made["rollouts"], **settings)
    with killed_in(Trainer, "step", calls=4):
        replay(tmp_path / "killed", made, made["rollouts"], **settings)
    last = replay(tmp_path / "killed", made, made["rollouts"], **settings)
    assert last.resumed_from == 2
    for name, file in (("model", "model.safetensors"), ("model", "metrics.jsonl"), ("rollouts", "data-00000.parquet")):
        assert (output(last, name) / file).read_bytes() == (output(whole, name) / file).read_bytes()


def test_what_is_refused_before_it_runs() -> None:
    config = Config(rewards=("exact_match",), dynamic_sampling_rounds=1, rollouts={"engine": "vllm"})
    problems = check(config, frozenset({"model", "dataset", "rollouts"}))
    assert [problem.split(":")[0] for problem in problems] == [
        "input rollouts brings its own prompts and rewards",
        "input rollouts brings its own rewards",
        "dynamic_sampling_rounds is of sampling; input rollouts is taken as it was recorded",
        "rollouts.engine vllm is of sampling; input rollouts is taken as it was recorded",
    ]
    assert check(Config(), frozenset({"model", "rollouts"})) == []
    assert any("input dataset is missing" in problem for problem in check(Config(), frozenset({"model"})))


def test_rollouts_that_do_not_fit(tmp_path: Path, made: dict[str, Path]) -> None:
    with pytest.raises(StageError, match=r"group of row r\d/1/0 has 4 completions, num_generations is 2; set it to 4"):
        replay(tmp_path / "size", made, made["rollouts"], num_generations=2)
    with pytest.raises(DataError, match=r"no column prompt_row_id.*give output `rollouts` of a stage rl or rescore"):
        replay(tmp_path / "other", made, made["dataset"])
    for name, change, said in (
        ("long", {"max_position_embeddings": 6}, r"row r\d/1/\d has [78] tokens, the model takes 6"),
        ("small", {"vocab_size": IDS["c"]}, r"has token \d+, the model knows \d+: they were sampled with another"),
    ):
        folder = tmp_path / name / "model"
        save_model(folder, seed=1)
        shrink(folder, change)
        with pytest.raises((StageError, DataError), match=said):
            replay(tmp_path / name, {**made, "model": folder}, made["rollouts"])


def shrink(folder: Path, change: dict[str, int]) -> None:
    """A model of the same kind that takes less."""
    from safetensors.torch import save_file

    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if rows := change.get("vocab_size"):
        weights = load_file(folder / "model.safetensors")
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            if name in weights:
                weights[name] = weights[name][:rows].clone()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
