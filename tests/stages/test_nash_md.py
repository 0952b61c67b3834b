"""The stage `nash_md`: its first step worked out independently, whom the policy meets, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from artifacts.errors import RequestError
from flows.recipe import Recipe
from stages.nash_md import STAGE, Config
from tests.data.characters import ids
from tests.stages import online_runs
from tests.stages.online_runs import assert_sampler_out_of_step_is_an_error, beta_changes, make_inputs
from tests.tiny_recipe import write_recipe

BETA = 0.3
SETTINGS: dict[str, Any] = {
    "rewards": ["tests.stages.small_models:letters"],
    "train_batch_size": 8,
    "max_steps": 1,
    "max_completion_length": 6,
    "learning_rate": 1e-3,
    "beta": BETA,
    "temperature": 0.8,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_inputs(tmp_path_factory.mktemp("made"))


def trained(made: dict[str, Any], folder: Path, **changes: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of metrics, rollouts) of a run against the other reference."""
    return online_runs.trained("nash_md", made, folder, SETTINGS | changes, other_reference=True)


def forced(made: dict[str, Any], rollout: dict[str, Any], share: float, temperature: float = 1.0) -> list[float]:
    """transformers' own log-probabilities of a completion's tokens under policy^(1 - share) reference^share."""
    prompt = ids(rollout["prompt"])
    tokens = torch.tensor([[*prompt, *rollout["token_ids"]]])
    with torch.no_grad():
        own, other = (made[name](input_ids=tokens).logits[0].double() for name in ("policy", "reference"))
    logprobs = (((1 - share) * own + share * other) / temperature).log_softmax(-1)
    return [float(logprobs[place - 1, tokens[0, place]]) for place in range(len(prompt), tokens.shape[1])]


def contests(rollouts: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(the policy's completion, the opponent's) of every prompt."""
    return [(rollouts[place], rollouts[place + 1]) for place in range(0, len(rollouts), 2)]


def test_the_first_step_by_hand(made: dict[str, Any], tmp_path: Path) -> None:
    """sum_t (beta (log pi - log pi_ref) - (P - 1/2)) log pi of the policy's completions alone; P = sigmoid(gap)."""
    (row,), rollouts = trained(made, tmp_path)
    pairs = contests(rollouts)
    assert len(pairs) == 8
    losses, scores, kls, entropies = [], [], [], []
    for own, other in pairs:
        assert own["logprobs"] == pytest.approx(forced(made, own, 0.0, 0.8), abs=1e-4)
        assert other["logprobs"] == pytest.approx(forced(made, other, 0.5, 0.8), abs=1e-4)
        advantage = 1 / (1 + math.exp(other["reward"] - own["reward"])) - 0.5
        assert (own["advantage"], other["advantage"]) == pytest.approx((advantage, 0.0))
        policy, reference = forced(made, own, 0.0), forced(made, own, 1.0)
        kl = [left - right for left, right in zip(policy, reference, strict=True)]
        scores.append(advantage * sum(policy))
        losses.append(sum(BETA * one * value for one, value in zip(kl, policy, strict=True)) - scores[-1])
        kls.append(sum(kl))
        entropies.append(-sum(policy))
    expected = {
        "loss": sum(losses) / 8,
        "loss/score": sum(scores) / 8,
        "loss/kl": sum(kls) / 8,
        "logps/chosen": -sum(entropies) / 8,
        "logps/rejected": -sum(entropies) / 8 - sum(kls) / 8,
        "objective/entropy": sum(entropies) / 8,
        "rewards/margins": sum(kls) / 8,
        "rewards/accuracies": sum(kl > 0 for kl in kls) / 8,
        "rewards/probabilities": sum(own["advantage"] for own, _ in pairs) / 8 + 0.5,
        "rewards/chosen": sum(own["reward"] for own, _ in pairs) / 8,
        "rewards/rejected": sum(other["reward"] for _, other in pairs) / 8,
        "val/model_contain_eos_token": sum(own["finished"] for own, _ in pairs) / 8,
        "val/ref_contain_eos_token": sum(other["finished"] for _, other in pairs) / 8,
        "mixture_coef": 0.5,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert 0 < sum(own["advantage"] > 0 for own, _ in pairs) < 8


def test_the_mixture_may_change_from_pass_to_pass(made: dict[str, Any], tmp_path: Path) -> None:
    """Four prompts, half a pass a step: the reference itself, then the mixture, then the policy, which stays."""
    changes = {"mixture_coef": [1.0, 0.25, 0.0], "train_batch_size": 2, "max_steps": 7, "learning_rate": 1e-9}
    rows, rollouts = trained(made, tmp_path, **changes)
    shares = [1.0, 1.0, 0.25, 0.25, 0.0, 0.0, 0.0]
    assert [row["mixture_coef"] for row in rows] == shares
    for own, other in contests(rollouts):
        assert own["logprobs"] == pytest.approx(forced(made, own, 0.0, 0.8), abs=1e-4)
        assert other["logprobs"] == pytest.approx(forced(made, other, shares[other["step"] - 1], 0.8), abs=1e-4)


def test_beta_may_change_from_pass_to_pass(made: dict[str, Any], tmp_path: Path) -> None:
    beta_changes(lambda folder, **changes: trained(made, folder, **changes)[0], tmp_path)


def test_the_higher_reward_is_always_preferred(made: dict[str, Any], tmp_path: Path) -> None:
    (row,), rollouts = trained(made, tmp_path, preference="higher", missing_eos_penalty=0.5)
    # rewards as they were compared, the penalty among them
    gaps = [own["reward"] - other["reward"] for own, other in contests(rollouts)]
    assert [own["advantage"] for own, _ in contests(rollouts)] == [0.5 * ((gap > 0) - (gap < 0)) for gap in gaps]
    assert row["rewards/probabilities"] == pytest.approx(
        0.5 + sum(own["advantage"] for own, _ in contests(rollouts)) / 8
    )


def test_of_unknown_rewards_neither_is_preferred(made: dict[str, Any], tmp_path: Path) -> None:
    (row,), _ = trained(made, tmp_path, rewards=["tests.stages.online_runs:first_alone"])
    assert row["rewards/probabilities"] == 0.5 and row["loss/score"] == 0.0


def test_it_raises_its_reward(made: dict[str, Any], tmp_path: Path) -> None:
    """The share of one letter of twelve, from about 0.03; on 4 prompts."""
    changes = {"learning_rate": 3e-3, "train_batch_size": 32, "max_steps": 12, "beta": 0.01, "preference": "higher"}
    rows, _ = trained(made, tmp_path, rewards=["tests.stages.online_runs:share_of_a"], **changes)
    assert rows[-1]["objective/model_scores"] > rows[0]["objective/model_scores"] + 0.08


def test_a_sampler_out_of_step_is_an_error(made: dict[str, Any], tmp_path: Path) -> None:
    assert_sampler_out_of_step_is_an_error(lambda: trained(made, tmp_path))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rewards": []}, "no reward"),
        ({"reward_weights": [1.0, 2.0]}, "2 numbers for 1 rewards"),
        ({"lora_r": 4, "lora_dropout": 0.1}, "lora_dropout is 0.1"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], problem: str) -> None:
    assert STAGE.check is not None
    (found,) = STAGE.check(Config(**({"rewards": ["exact_match"]} | changes)), frozenset({"model", "dataset"}))
    assert problem in found


def test_a_recipe_that_asks_for_an_engine_is_told_why_there_is_none(tmp_path: Path) -> None:
    wired = {"model": "base", "dataset": "rows"}
    settings = {"rewards": ["exact_match"], "rollouts": {"engine": "vllm"}}
    recipe = write_recipe(tmp_path, {"nash": {"uses": "nash_md", "inputs": wired, "with": settings}})
    said = r"drawn from the logits of policy and reference together.*leave it out"
    with pytest.raises(RequestError, match=said):
        Recipe.load(str(recipe))


@pytest.mark.parametrize("given", [{"mixture_coef": 1.5}, {"mixture_coef": []}, {"preference": "rank"}, {"beta": 0.0}])
def test_values_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(given))):
        Config(rewards=("exact_match",), **given)
