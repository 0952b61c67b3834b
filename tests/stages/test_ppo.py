"""The stage `ppo`: its first steps worked out independently, what its settings do, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from artifacts.errors import StageError
from stages.ppo import STAGE, Config
from stages.training.optimization import Optimization
from stages.training.processes import Processes
from stages.training.token_table import TokenTable
from tests.data.characters import ids
from tests.stages import online_runs
from tests.stages.online_runs import make_inputs
from tests.stages.small_models import output, run_stage

SETTINGS: dict[str, Any] = {
    "rewards": ["tests.stages.small_models:letters"],
    "train_batch_size": 4,
    "max_steps": 1,
    "num_ppo_epochs": 1,
    "max_completion_length": 5,
    "temperature": 1.0,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_inputs(tmp_path_factory.mktemp("made"))


def trained(made: dict[str, Any], folder: Path, **changes: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of metrics, rollouts) of a run."""
    other = changes.pop("other_reference", False)
    return online_runs.trained("ppo", made, folder, SETTINGS | changes, other_reference=other)


def forced(model: Any, rollout: dict[str, Any]) -> list[float]:
    """transformers' own log-probabilities of a completion's tokens."""
    prompt = ids(rollout["prompt"])
    tokens = [*prompt, *rollout["token_ids"]]
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return [float(logprobs[place - 1, tokens[place]]) for place in range(len(prompt), len(tokens))]


def test_the_first_step_by_hand(made: dict[str, Any], tmp_path: Path) -> None:
    """The head says 0 everywhere, so with lambda 1 the advantage of a token is the sum of all rewards from it on.

    Rewards: -0.1 (log pi - log pi_ref) at every token, the number of different letters at the last. Advantages are
    whitened over all tokens; on policy the loss is minus their mean, 0. Half the squared returns are the value loss.
    """
    (row,), rollouts = trained(made, tmp_path, other_reference=True, kl_coef=0.1, lam=1.0, vf_coef=0.5)
    returns: list[list[float]] = []
    kls, entropies = [], []
    for rollout in rollouts:
        policy, reference = forced(made["policy"], rollout), forced(made["reference"], rollout)
        kl = [left - right for left, right in zip(policy, reference, strict=True)]
        rewards = [-0.1 * value for value in kl]
        rewards[-1] += rollout["reward"]
        returns.append([sum(rewards[place:]) for place in range(len(rewards))])
        kls.append(sum(kl))
        entropies.append(-sum(policy))
    flat = torch.tensor([value for one in returns for value in one], dtype=torch.float64)
    white = (flat - flat.mean()) / (flat.var() + 1e-8).sqrt()
    means = [float(part.mean()) for part in white.split([len(one) for one in returns])]
    assert [rollout["advantage"] for rollout in rollouts] == pytest.approx(means, abs=1e-4)
    score = sum(rollout["reward"] for rollout in rollouts) / 4
    expected = {
        "objective/kl": sum(kls) / 4,
        "objective/entropy": sum(entropies) / 4,
        "objective/scores": score,
        "objective/non_score_reward": -0.1 * sum(kls) / 4,
        "objective/rlhf_reward": score - 0.1 * sum(kls) / 4,
        "kl": sum(kls) / len(flat),
        "loss/policy_avg": 0.0,
        "loss/value_avg": float(flat.square().mean()) / 2,
        "loss": float(flat.square().mean()) / 4,
        "val/ratio": 1.0,
        "policy/approxkl_avg": 0.0,
        "policy/clipfrac_avg": 0.0,
        "val/num_eos_tokens": sum(rollout["finished"] for rollout in rollouts),
        "episode": 4.0,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert (row["val/ratio"], row["policy/approxkl_avg"]) == (1.0, 0.0)
    assert "frac_reward_zero_std" not in row  # there are no groups


def test_lambda_zero_with_a_head_that_says_nothing_sees_one_reward_at_a_time(
    made: dict[str, Any], tmp_path: Path
) -> None:
    """A_t = r_t: without a reference only last tokens have one. The value loss is half of their squares, over all."""
    (row,), rollouts = trained(made, tmp_path, kl_coef=0.0, lam=0.0)
    tokens = sum(len(rollout["token_ids"]) for rollout in rollouts)
    assert row["loss/value_avg"] == pytest.approx(sum(one["reward"] ** 2 for one in rollouts) / tokens / 2, abs=1e-5)
    assert "objective/kl" not in row


def test_completions_that_do_not_end_are_worth_less(made: dict[str, Any], tmp_path: Path) -> None:
    (plain,), rollouts = trained(made, tmp_path / "plain", max_completion_length=3, train_batch_size=16)
    (less,), _ = trained(made, tmp_path / "less", max_completion_length=3, train_batch_size=16, missing_eos_penalty=2.0)
    unfinished = sum(not rollout["finished"] for rollout in rollouts)
    assert unfinished > 0
    assert less["objective/scores"] == pytest.approx(plain["objective/scores"] - 2 * unfinished / 16)


def test_ratios_leave_one_and_the_head_learns(made: dict[str, Any], tmp_path: Path) -> None:
    """Forty passes over four completions: the policy moves away from sampling time, values come near the returns."""
    changes = {"num_ppo_epochs": 40, "max_steps": 40, "cliprange_value": 100.0, "value_learning_rate": 3e-2}
    rows, _ = trained(made, tmp_path, **changes)
    assert (rows[0]["val/ratio"], rows[0]["policy/approxkl_avg"]) == (1.0, 0.0)
    assert rows[-1]["policy/approxkl_avg"] > 1e-4
    assert rows[-1]["loss/value_avg"] < 0.3 * rows[0]["loss/value_avg"]
    assert {row["episode"] for row in rows} == {4.0}


def test_a_step_does_not_depend_on_its_micro_batches(made: dict[str, Any], tmp_path: Path) -> None:
    whole, _ = trained(made, tmp_path / "whole", max_steps=3, num_ppo_epochs=3)
    cut, _ = trained(made, tmp_path / "cut", max_steps=3, num_ppo_epochs=3, micro_batch_tokens=1)
    for left, right in zip(whole, cut, strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-5)


def test_kl_coef_is_adapted_between_generations(made: dict[str, Any], tmp_path: Path) -> None:
    """Ziegler et al.: of 4 completions and a horizon of 40, a KL far above its target adds 0.2 x 4 / 40 = 2 %."""
    rows, _ = trained(made, tmp_path, other_reference=True, max_steps=3, kl_coef=0.05, kl_target=1e-3, kl_horizon=40)
    assert all(row["objective/kl"] > 1 for row in rows)
    coefficients = [row["objective/kl_coef"] for row in rows]
    assert coefficients == pytest.approx([0.05, 0.05 * 1.02, 0.05 * 1.02**2])


def test_the_exported_model_has_no_value_head(made: dict[str, Any], tmp_path: Path) -> None:
    from safetensors import safe_open

    AcceleratorState._reset_state(reset_partial_state=True)
    inputs = {"model": made["folder"] / "policy", "dataset": made["rows"]}
    folder = output(run_stage("ppo", tmp_path, inputs, **SETTINGS), "model")

    def names(path: Path) -> set[str]:
        with safe_open(path / "model.safetensors", framework="pt") as file:
            return set(file.keys())

    assert names(folder) == names(made["folder"] / "policy")


def test_the_head_has_a_learning_rate_of_its_own() -> None:
    """AdamW's first step is rate x sign of the gradient: 1e-3 for the policy, 5e-2 for the head."""
    config = Config(rewards=("exact_match",), learning_rate=1e-3, value_learning_rate=5e-2, max_grad_norm=None)
    tensors = {
        "model.weight": torch.nn.Parameter(torch.ones(2, 2)),
        "value_head.weight": torch.nn.Parameter(torch.ones(1, 2)),
    }
    optimization = Optimization(tensors, config, Processes(0, 1, torch.device("cpu")))
    for one in tensors.values():
        one.grad = torch.full_like(one, 0.3)
    optimization.step(1e-3)
    assert tensors["model.weight"].flatten().tolist() == pytest.approx([1 - 1e-3] * 4, abs=1e-6)
    assert tensors["value_head.weight"].flatten().tolist() == pytest.approx([1 - 5e-2] * 2, abs=1e-6)
    for one in tensors.values():
        one.grad = torch.full_like(one, 0.3)
    optimization.step(5e-4)  # half of both
    assert tensors["value_head.weight"].flatten().tolist() == pytest.approx([1 - 7.5e-2] * 2, abs=1e-5)


def test_a_completion_without_a_reward_is_an_error(made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"no reward function scored completion 0 of row r\d"):
        trained(made, tmp_path, rewards=["tests.stages.online_runs:first_alone"])


def test_a_sampler_out_of_step_is_an_error(made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StageError, match="the sampler has other weights"):
        original = TokenTable.of
        patch.setattr(
            TokenTable,
            "of",
            lambda groups, old, *rest: original(groups, [[[v - 1 for v in b] for b in g] for g in old], *rest),
        )
        trained(made, tmp_path)


def test_completions_that_the_sampler_finds_likelier_are_corrected_for(made: dict[str, Any], tmp_path: Path) -> None:
    """A sampler that is 0.009 nats off, to one side at even places and to the other at odd ones: the product of the
    ratios is 1 for completions of even length and exp(0.009) for others, which a bound of 1.005 masks. On policy the
    loss is minus the mean advantage of all tokens, and means of what is left of them are in the rollouts."""
    plain, rollouts = trained(made, tmp_path / "plain", train_batch_size=8)
    original = TokenTable.of

    def off(groups: Any, *rest: Any) -> TokenTable:
        moved = []
        for group in groups:
            sampled = [[v - 0.009 * (-1) ** place for place, v in enumerate(b)] for b in group.data.sampled_logprobs]
            moved.append(replace(group, data=replace(group.data, sampled_logprobs=tuple(sampled))))
        return original(moved, *rest)

    bounds = {"importance_sampling_mode": "sequence_mask", "importance_sampling_clip_max": 1.005}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenTable, "of", off)
        (row,), corrected = trained(made, tmp_path / "corrected", train_batch_size=8, **bounds)
    lengths = [len(rollout["token_ids"]) for rollout in corrected]
    assert lengths == [len(rollout["token_ids"]) for rollout in rollouts]
    expected = [one["advantage"] * (length % 2 == 0) for one, length in zip(rollouts, lengths, strict=True)]
    assert 0 < sum(length % 2 for length in lengths) < 8
    assert [rollout["advantage"] for rollout in corrected] == pytest.approx(expected, abs=1e-5)
    loss = -sum(map(math.prod, zip(expected, lengths, strict=True))) / sum(lengths)
    assert row["loss/policy_avg"] == pytest.approx(loss, abs=1e-5)
    ratio = "sampling/importance_sampling_ratio"
    assert (row[f"{ratio}/min"], row[f"{ratio}/max"]) == (0.0, pytest.approx(1.0, abs=1e-5))
    kept = sum(length % 2 == 0 for length in lengths) / len(lengths)
    assert row[f"{ratio}/mean"] == pytest.approx(kept, abs=1e-5)
    assert f"{ratio}/mean" not in plain[0]


def test_it_raises_its_reward(made: dict[str, Any], tmp_path: Path) -> None:
    """The share of one letter of twelve, from about 0.03; on 4 prompts."""
    changes = {
        "learning_rate": 3e-3,
        "max_completion_length": 6,
        "num_ppo_epochs": 2,
        "kl_coef": 0.0,
        "value_learning_rate": 1e-2,
        "train_batch_size": 32,
        "max_steps": 18,
    }
    rows, _ = trained(made, tmp_path, rewards=["tests.stages.online_runs:share_of_a"], **changes)
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.08


@pytest.mark.parametrize(
    ("changes", "wired", "problem"),
    [
        ({"rewards": []}, set(), "no reward"),
        ({"rewards": ["exact_match"], "reward_weights": [1.0, 2.0]}, set(), "2 numbers for 1 rewards"),
        ({"rewards": ["exact_match"], "kl_coef": 0.0}, {"reference"}, "kl_coef is 0"),
        ({"rewards": ["exact_match"], "kl_coef": 0.0, "kl_target": 1.0}, set(), "kl_target adapts kl_coef, which is 0"),
        ({"rewards": ["exact_match"], "kl_horizon": 5}, set(), "kl_horizon would do nothing"),
        ({"rewards": ["exact_match"], "importance_sampling_clip_max": 2.0}, set(), "importance_sampling_mode is null"),
        ({"rewards": ["exact_match"], "lora_r": 2, "lora_dropout": 0.1}, set(), "lora_dropout is 0.1"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], wired: set[str], problem: str) -> None:
    assert STAGE.check is not None
    problems = STAGE.check(Config(**changes), frozenset({"model", "dataset", *wired}))
    assert len(problems) == 1 and problem in problems[0]
