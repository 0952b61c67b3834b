"""The stage `online_dpo`: its first step worked out independently, which pairs it makes, and what it refuses."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from stages.online_dpo import STAGE, Config
from tests.data.characters import ids
from tests.stages import online_runs
from tests.stages.online_runs import assert_sampler_out_of_step_is_an_error, beta_changes, make_inputs
from tests.stages.small_models import output, read_lines, rows_of, run_stage, states

BETA = 0.3
SETTINGS: dict[str, Any] = {
    "rewards": ["tests.stages.small_models:letters"],
    "train_batch_size": 4,
    "num_generations": 4,
    "max_steps": 1,
    "max_completion_length": 6,
    "learning_rate": 1e-3,
    "beta": BETA,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_inputs(tmp_path_factory.mktemp("made"))


def trained(made: dict[str, Any], folder: Path, **changes: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of metrics, rollouts) of a run."""
    other = changes.pop("other_reference", False)
    return online_runs.trained("online_dpo", made, folder, SETTINGS | changes, other_reference=other)


def forced(model: Any, rollout: dict[str, Any], temperature: float = 1.0) -> float:
    """transformers' own log-probability of a completion."""
    prompt = ids(rollout["prompt"])
    tokens = [*prompt, *rollout["token_ids"]]
    with torch.no_grad():
        logprobs = (model(input_ids=torch.tensor([tokens])).logits[0].double() / temperature).log_softmax(-1)
    return sum(float(logprobs[place - 1, tokens[place]]) for place in range(len(prompt), len(tokens)))


def pairs_of(rollouts: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(the best, the worst) of every prompt's completions, where they differ."""
    by_prompt: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for rollout in rollouts:
        by_prompt[rollout["prompt_row_id"]].append(rollout)
    pairs = [
        (max(group, key=lambda one: one["reward"]), min(group, key=lambda one: one["reward"]))
        for group in by_prompt.values()
    ]
    return [(best, worst) for best, worst in pairs if best["reward"] > worst["reward"]]


def gap(completions: list[str], **_: Any) -> list[float]:
    """Different for different completions, so that there is one best and one worst."""
    return [float(sum(ord(letter) * 31**place for place, letter in enumerate(text)) % 997) for text in completions]


def test_the_first_step_by_hand(made: dict[str, Any], tmp_path: Path) -> None:
    """-log sigmoid(beta d) of the best against the worst completion, d from transformers' log-probabilities."""
    (row,), rollouts = trained(made, tmp_path, other_reference=True, rewards=["tests.stages.test_online_dpo:gap"])
    pairs = pairs_of(rollouts)
    assert len(pairs) == 4
    ratios = [
        [forced(made["policy"], one) - forced(made["reference"], one) for one in (best, worst)] for best, worst in pairs
    ]
    losses = [math.log1p(math.exp(-BETA * (chosen - rejected))) for chosen, rejected in ratios]
    expected = {
        "loss": sum(losses) / 4,
        "rewards/chosen": BETA * sum(chosen for chosen, _ in ratios) / 4,
        "rewards/rejected": BETA * sum(rejected for _, rejected in ratios) / 4,
        "logps/chosen": sum(forced(made["policy"], best) for best, _ in pairs) / 4,
        "logps/rejected": sum(forced(made["policy"], worst) for _, worst in pairs) / 4,
        "objective/scores": sum(one["reward"] for one in rollouts) / 16,
        "objective/scores_margin": sum(best["reward"] - worst["reward"] for best, worst in pairs) / 4,
        "val/contain_eos_token": sum(one["finished"] for one in rollouts) / 16,
        **objective(made, pairs, ratios),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def objective(
    made: dict[str, Any], pairs: list[tuple[dict[str, Any], dict[str, Any]]], ratios: list[list[float]]
) -> dict[str, float]:
    """TRL's `objective/...`, of the completions of these pairs with these log-ratios."""
    count, kl = 2 * len(pairs), sum(map(sum, ratios))
    reward = sum(one["reward"] for pair in pairs for one in pair)
    return {
        "objective/kl": kl / count,
        "objective/entropy": -sum(forced(made["policy"], one) for pair in pairs for one in pair) / count,
        "objective/non_score_reward": -BETA * kl / count,
        "objective/rlhf_reward": (reward - BETA * kl) / count,
    }


def test_xpo_by_hand(made: dict[str, Any], tmp_path: Path) -> None:
    """DPO of the policy's completion against the reference's, and alpha times the policy's view of the latter.

    The second completion of a prompt was drawn from the reference, at the temperature that is asked for. Where both are
    worth the same there is no pair, and the exploration alone remains.
    """
    changes = {"num_generations": 2, "xpo_alpha": 0.05, "train_batch_size": 8, "temperature": 0.8}
    (row,), rollouts = trained(made, tmp_path, other_reference=True, **changes)
    rows = [(rollouts[place], rollouts[place + 1]) for place in range(0, len(rollouts), 2)]
    assert len(rows) == 8 and all(own["prompt"] == other["prompt"] for own, other in rows)
    for own, other in rows:
        for rollout, author in ((own, "policy"), (other, "reference")):
            assert sum(rollout["logprobs"]) == pytest.approx(forced(made[author], rollout, 0.8), abs=1e-4)
    dpo, xpo, pairs, ratios = [], [], [], []
    for own, other in rows:
        pair = (other, own) if other["reward"] > own["reward"] else (own, other)
        pairs.append(pair)
        ratios.append([forced(made["policy"], one) - forced(made["reference"], one) for one in pair])
        margin = ratios[-1][0] - ratios[-1][1]
        dpo.append(math.log1p(math.exp(-BETA * margin)) if own["reward"] != other["reward"] else 0.0)
        xpo.append(0.05 * forced(made["policy"], other))
    assert 0 < dpo.count(0.0) < 8 and any(pair[0] is other for pair, (_, other) in zip(pairs, rows, strict=True))
    expected = {
        "loss": (sum(dpo) + sum(xpo)) / 8,
        "loss/dpo": sum(dpo) / 8,
        "loss/xpo": sum(xpo) / 8,
        "alpha": 0.05,
        "objective/model_scores": sum(own["reward"] for own, _ in rows) / 8,
        "objective/ref_scores": sum(other["reward"] for _, other in rows) / 8,
        "objective/scores_margin": sum(own["reward"] - other["reward"] for own, other in rows) / 8,
        "val/model_contain_eos_token": sum(own["finished"] for own, _ in rows) / 8,
        "val/ref_contain_eos_token": sum(other["finished"] for _, other in rows) / 8,
        **objective(made, pairs, ratios),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_exploration_may_end(made: dict[str, Any], tmp_path: Path) -> None:
    """A step is a pass over the four prompts; in the third the last alpha stays."""
    changes = {"num_generations": 2, "xpo_alpha": [0.05, 0.0], "max_steps": 3}
    rows, _ = trained(made, tmp_path, **changes)
    assert [row["alpha"] for row in rows] == [0.05, 0.0, 0.0]
    assert rows[0]["loss/xpo"] < 0 and rows[1]["loss/xpo"] == rows[2]["loss/xpo"] == 0.0


def test_adapters_explore_away_from_the_model_without_them(made: dict[str, Any], tmp_path: Path) -> None:
    """One model in memory: the second completion is of the weights without adapters, after the adapters moved too."""
    changes = {"num_generations": 2, "xpo_alpha": 0.05, "max_steps": 2, "lora_r": 2, "learning_rate": 0.1}
    _, rollouts = trained(made, tmp_path, **changes)
    policies = [sum(one["logprobs"]) - forced(made["policy"], one, 0.9) for one in rollouts[8::2]]
    references = [sum(one["logprobs"]) - forced(made["policy"], one, 0.9) for one in rollouts[9::2]]
    assert max(map(abs, references)) < 1e-4 and min(map(abs, policies)) > 1e-3


def test_beta_may_change_from_pass_to_pass(made: dict[str, Any], tmp_path: Path) -> None:
    beta_changes(lambda folder, **changes: trained(made, folder, other_reference=True, **changes)[0], tmp_path)


def test_against_itself_every_pair_starts_at_log_2(made: dict[str, Any], tmp_path: Path) -> None:
    rows, _ = trained(made, tmp_path, max_steps=3, rewards=["tests.stages.test_online_dpo:gap"])
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert rows[1]["loss"] != pytest.approx(math.log(2), abs=1e-6)  # the reference stays


def flat(completions: list[str], **_: Any) -> list[float]:
    return [0.5] * len(completions)


def test_equal_completions_teach_nothing(made: dict[str, Any], tmp_path: Path) -> None:
    """Two steps, each with one more round: nothing is ever told apart, so no weight moves and no row was of use."""
    AcceleratorState._reset_state(reset_partial_state=True)
    inputs = {"model": made["folder"] / "policy", "dataset": made["rows"]}
    settings = SETTINGS | {"rewards": ["tests.stages.test_online_dpo:flat"], "dynamic_sampling_rounds": 1}
    context = run_stage("online_dpo", tmp_path, inputs, **settings)
    (row,) = read_lines(output(context, "model") / "metrics.jsonl")
    assert row["loss"] == row["grad_norm"] == row["objective/scores_margin"] == 0.0
    assert row["dynamic_sampling/replaced_groups"] == row["dynamic_sampling/remaining_groups"] == 4
    assert len(rows_of(output(context, "rollouts"))) == 2 * 16
    assert states(output(context, "model")) == {"without signal": 4}


def test_a_pair_needs_two_scores(made: dict[str, Any], tmp_path: Path) -> None:
    (row,), _ = trained(made, tmp_path, rewards=["tests.stages.online_runs:first_alone"])
    assert row["loss"] == row["grad_norm"] == 0.0


def test_completions_that_do_not_end_are_worth_less(made: dict[str, Any], tmp_path: Path) -> None:
    (plain,), rollouts = trained(made, tmp_path / "plain", max_completion_length=3)
    (less,), _ = trained(made, tmp_path / "less", max_completion_length=3, missing_eos_penalty=2.0)
    unfinished = sum(not rollout["finished"] for rollout in rollouts)
    assert unfinished > 0
    assert less["objective/scores"] == pytest.approx(plain["objective/scores"] - 2 * unfinished / 16)


def test_a_reference_that_follows_the_model_at_once_is_the_model(made: dict[str, Any], tmp_path: Path) -> None:
    """sync_ref_model with a share of 1 at every step: before each step both are one again, and the loss is log 2."""
    changes = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1, "max_steps": 3}
    rows, _ = trained(made, tmp_path, rewards=["tests.stages.test_online_dpo:gap"], **changes)
    assert [row["loss"] for row in rows] == pytest.approx([math.log(2)] * 3, abs=1e-5)


def test_a_sampler_out_of_step_is_an_error(made: dict[str, Any], tmp_path: Path) -> None:
    assert_sampler_out_of_step_is_an_error(lambda: trained(made, tmp_path))


def test_it_raises_its_reward(made: dict[str, Any], tmp_path: Path) -> None:
    """The share of one letter of twelve, from about 0.03; on 4 prompts."""
    changes = {"learning_rate": 3e-3, "max_completion_length": 6, "train_batch_size": 16, "max_steps": 12}
    rows, _ = trained(made, tmp_path, rewards=["tests.stages.online_runs:share_of_a"], **changes)
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.08


@pytest.mark.parametrize(
    ("changes", "wired", "problem"),
    [
        ({"rewards": []}, set(), "no reward"),
        ({"reward_weights": [1.0, 2.0]}, set(), "2 numbers for 1 rewards"),
        ({"loss_type": "tpo"}, set(), "tpo takes more than one pair at a time"),
        ({"loss_type": "aot"}, set(), "aot takes more than one pair at a time"),
        ({"loss_type": "simpo"}, {"reference"}, "simpo has no reference"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, set(), "label_smoothing is of loss_type"),
        ({"lora_r": 4, "lora_dropout": 0.1}, set(), "lora_dropout is 0.1, but completions are sampled without"),
        ({"xpo_alpha": 0.1, "num_generations": 4}, set(), "there are two completions of a prompt"),
        ({"xpo_alpha": 0.1, "loss_type": "simpo"}, set(), "xpo_alpha is of losses with a reference"),
        ({"xpo_alpha": [0.1], "sync_ref_model": True}, set(), "sync_ref_model moves it"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], wired: set[str], problem: str) -> None:
    assert STAGE.check is not None
    config = Config(**({"rewards": ["exact_match"]} | changes))
    problems = STAGE.check(config, frozenset({"model", "dataset", *wired}))
    assert len(problems) == 1 and problem in problems[0]
