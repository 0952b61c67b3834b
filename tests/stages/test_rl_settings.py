"""Settings of policy losses: what is refused and why, and what a whole stage makes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import AutoModelForCausalLM

from stages.foreign import foreign
from stages.losses.advantages import rloo
from stages.losses.policy import POLICY_LOSSES
from stages.losses.policy_aggregation import AGGREGATIONS
from stages.rl import Config, check
from stages.training.policy_known import Known
from stages.training.policy_terms import PolicyTerms
from tests.data.characters import ids
from tests.stages.small_models import output, read_lines, rows_of, run_stage, save_dataset, save_model

WIRED = frozenset({"model", "dataset"})
REUSED: dict[str, Any] = {"num_iterations": 2}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"loss_type": "cispo"}, r"cispo bounds the ratio itself at epsilon_high, found None"),
    ({"loss_type": "cispo", "epsilon_high": 0.28}, r"found 0.28: every ratio of 1 would be clamped"),
    ({"loss_type": "cispo", "epsilon_high": 5.0, "epsilon": 0.2}, r"epsilon is of loss_type grpo, .*; cispo has none"),
    ({"loss_type": "sapo", "epsilon_high": 0.3}, r"epsilon_high is of loss_type .*; sapo has none"),
    ({"delta": 1.2, "epsilon_high": 0.28}, r"delta 1.2 is no bound beyond .* above 1.28"),
    ({"loss_type": "gmpo", "delta": 3.0}, r"delta is of loss_type grpo, .*; gmpo has none"),
    ({"vespo_k_pos": 1.0}, r"vespo_k_pos is of loss_type vespo; dapo has none"),
    ({"sapo_temperature_neg": 2.0}, r"sapo_temperature_neg is of loss_type sapo; dapo has none"),
    ({"loss_type": "gspo", "importance_sampling_level": "token"}, r"gspo has ratios of its own \(sequence\)"),
    ({"loss_type": "gmpo", "importance_sampling_level": "sequence"}, r"gmpo has ratios of its own \(token\)"),
    ({"kl_estimator": "k2"}, r"kl_estimator is given, but beta is 0"),
    ({"use_bias_correction_kl": True}, r"use_bias_correction_kl is given, but beta is 0"),
    ({"kl_placement": "reward"}, r"kl_placement is given, but beta is 0"),
    ({"beta": 0.1, "kl_estimator": "k1"}, r"k1 in the loss has a gradient that is zero on average"),
    (
        {"beta": 0.1, "kl_placement": "reward", "use_bias_correction_kl": True},
        r"use_bias_correction_kl is of kl_placement",
    ),
    ({"off_policy_mask_threshold": 0.1}, r"every step is on policy, so nothing would be masked"),
    ({"importance_sampling_clip_max": 2.0}, r"clip_max is given, but importance_sampling_mode is null"),
    ({"importance_sampling_clip_min": 0.5}, r"clip_min is given, but importance_sampling_mode is null"),
    (
        {"importance_sampling_mode": "token_mask", "importance_sampling_clip_max": None},
        r"importance_sampling_mode token_mask has no bounds",
    ),
    (
        {"loss_type": "vespo", "importance_sampling_mode": "sequence_mask"},
        r"vespo multiplies the corrections of tokens; give one of token_truncate, token_mask",
    ),
    ({"entropy_target": 0.5}, r"entropy_target is given, but use_adaptive_entropy is false"),
    ({"entropy_coef_delta": 0.1}, r"entropy_coef_delta is given, but use_adaptive_entropy is false"),
    ({"use_adaptive_entropy": True, "entropy_coef": 2.0}, r"entropy_coef 2.0 is not between .* 0.0 and .* 1.0"),
    ({"advantage_estimator": "rloo", "scale_rewards": "batch"}, r"scale_rewards is of advantage_estimator grpo; rloo"),
    ({"normalize_advantages": True}, r"normalize_advantages is of advantage_estimator rloo; grpo has none"),
    ({"reward_clip_range": [1.0, -1.0]}, r"reward_clip_range \[1.0, -1.0\] is no range"),
    ({"reward_weights": [1.0, 2.0]}, r"reward_weights has 2 numbers for 1 rewards"),
    (
        {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
        r"normalizes each reward by itself, so scale_rewards does not go with it",
    ),
    (
        {"multi_objective_aggregation": "normalize_then_sum", "beta": 0.1, "kl_placement": "reward"},
        r"so kl_placement: reward does not go with it",
    ),
]
TAKEN: list[dict[str, Any]] = [
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "gspo", "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "delta": 4.0},
    {"loss_type": "vespo", "importance_sampling_mode": "token_truncate", "importance_sampling_clip_min": 0.5},
    {"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": True},
    {"beta": 0.1, "kl_estimator": "k3", "kl_placement": "reward"},
    {"off_policy_mask_threshold": 0.1, **REUSED},
    {"off_policy_mask_threshold": 0.1, "top_p": 0.9},
    {"use_adaptive_entropy": True, "entropy_target": 0.5},
    {"advantage_estimator": "rloo", "normalize_advantages": True, "reward_clip_range": [-1.0, 1.0]},
    {"advantage_estimator": "reinforce_plus_plus_baseline", "top_entropy_quantile": 0.2},
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_refused(settings: dict[str, Any], message: str) -> None:
    (problem,) = check(Config(rewards=["exact_match"], **settings), WIRED)
    assert re.search(message, problem), problem


@pytest.mark.parametrize("settings", TAKEN)
def test_taken(settings: dict[str, Any]) -> None:
    assert check(Config(rewards=["exact_match"], **settings), WIRED) == []


def test_other_tools_names_lead_to_ours() -> None:
    for name, ours in {
        "vllm_importance_sampling_mode": "importance_sampling_mode",
        "vllm_importance_sampling_correction": "importance_sampling_mode",
        "vllm_importance_sampling_clip_max": "importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min": "importance_sampling_clip_min",
        "clip_ratio_high": "epsilon_high",
    }.items():
        assert f"here it is `{ours}`" in foreign(name, list(Config.model_fields))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "model", seed=3)
    rows = [{"prompt": prompt} for prompt in ("abc", "da", "hgf", "cab")]
    return {"model": folder / "model", "dataset": save_dataset(folder / "rows", "prompt", rows)}


RUN: dict[str, Any] = {
    "learning_rate": 1e-2,
    "train_batch_size": 6,
    "num_generations": 3,
    "max_completion_length": 4,
    "max_length": 16,
    "rewards": ["tests.stages.small_models:letters"],
}


@pytest.mark.parametrize("loss", ["dapo", "gspo", "vespo"])
def test_first_steps_are_on_policy(
    tmp_path: Path, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Two steps use every generation: of the first all ratios are exactly 1, of the second they have moved."""
    seen: list[list[Tensor]] = []
    original, step = PolicyTerms.tokens, PolicyTerms.known

    def known(self: PolicyTerms, batch: Any) -> Known:
        seen.append([])
        return step(self, batch)

    def tokens(self: PolicyTerms, known: Known, logprobs_N: Tensor) -> Any:
        found = original(self, known, logprobs_N)
        seen[-1].append(found.log_ratios_N.detach())
        return found

    monkeypatch.setattr(PolicyTerms, "known", known)
    monkeypatch.setattr(PolicyTerms, "tokens", tokens)
    run_stage("rl", tmp_path, made, **RUN, **REUSED, loss_type=loss, max_steps=4)
    assert len(seen) == 4 and all(seen)
    for use, ratios in enumerate(seen):
        assert all((part == 0).all() for part in ratios) == (use % 2 == 0)


def test_at_the_first_step_all_losses_are_one(tmp_path: Path, made: dict[str, Path]) -> None:
    """On policy their gradients differ by their aggregation alone: gradient norms of whole stages."""
    norms: dict[str, list[float]] = {}
    for name, loss in POLICY_LOSSES.items():
        given = {"epsilon_high": 2.0} if name == "cispo" else {}
        AcceleratorState._reset_state(reset_partial_state=True)
        context = run_stage("rl", tmp_path / name, made, **RUN, **given, loss_type=name, max_steps=1)
        (row,) = read_lines(output(context, "model") / "metrics.jsonl")
        (kind,) = (kind for kind, one in AGGREGATIONS.items() if one is loss.aggregation)
        norms.setdefault(kind, []).append(row["grad_norm"])
    assert norms.keys() == AGGREGATIONS.keys() and {len(found) for found in norms.values()} == {1, 4, 5}
    for found in norms.values():
        assert found == pytest.approx([found[0]] * len(found), rel=1e-5)
    assert len({round(found[0], 4) for found in norms.values()}) == 4


def test_divergence_off_the_reward(tmp_path: Path, made: dict[str, Path]) -> None:
    """Advantages again, from the rollouts' own log-probabilities and transformers' of the reference."""
    settings = {"advantage_estimator": "rloo", "loss_type": "grpo", "importance_sampling_level": "sequence_sum"}
    placed = {"beta": 0.5, "kl_placement": "reward"}
    context = run_stage("rl", tmp_path, made, **RUN, **settings, **placed, max_steps=2)
    base = AutoModelForCausalLM.from_pretrained(made["model"])
    rows = rows_of(output(context, "rollouts"))
    penalties = []
    for row in rows:
        prompt = ids(row["prompt"])
        with torch.no_grad():
            logs = base(input_ids=torch.tensor([prompt + row["token_ids"]])).logits[0].log_softmax(-1)
        forced = [float(logs[len(prompt) + t - 1, token]) for t, token in enumerate(row["token_ids"])]
        penalties.append(0.5 * (sum(row["logprobs"]) - sum(forced)))
    assert max(map(abs, penalties[:6])) < 1e-4 and max(map(abs, penalties[6:])) > 1e-3
    rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64) - torch.tensor(penalties).double()
    expected = rloo(rewards.reshape(-1, 3)).flatten()
    assert [row["advantage"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-4)
    metrics = read_lines(output(context, "model") / "metrics.jsonl")
    tokens = sum(len(row["token_ids"]) for row in rows[6:])
    assert metrics[1]["kl"] == pytest.approx(sum(penalties[6:]) / 0.5 / tokens, abs=1e-4)


def test_entropy_is_held_up(tmp_path: Path, made: dict[str, Path]) -> None:
    """With nothing to win the bonus alone moves the model, to higher entropy; the choice of tokens is a choice."""
    flat = {**RUN, "rewards": ["tests.stages.test_rl_settings:nothing_to_win"], "max_steps": 6}
    plain = run_stage("rl", tmp_path / "plain", made, **flat, entropy_coef=0.5)
    AcceleratorState._reset_state(reset_partial_state=True)
    rows = read_lines(output(plain, "model") / "metrics.jsonl")
    assert rows[-1]["entropy"] > rows[0]["entropy"] + 0.05
    assert rows[0]["loss"] == pytest.approx(-0.5 * rows[0]["entropy"], rel=1e-5)
    assert rows[0]["policy_loss"] == pytest.approx(0, abs=1e-6) and rows[0]["entropy_coef"] == 0.5
    chosen = run_stage("rl", tmp_path / "chosen", made, **flat, entropy_coef=0.5, top_entropy_quantile=0.3)
    row = read_lines(output(chosen, "model") / "metrics.jsonl")[0]
    assert row["entropy/kept"] > row["entropy"] and row["entropy"] == pytest.approx(rows[0]["entropy"], rel=1e-6)
    assert row["loss"] == pytest.approx(-0.5 * row["entropy/kept"], rel=1e-5)


def nothing_to_win(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)
