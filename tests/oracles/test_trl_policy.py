"""Losses, importance ratios and advantages of on-line learning against TRL's own code on the same tokens.

TRL's loss methods read log-probabilities and entropies of the same tiny model, padded; ours goes over packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.advantages import grpo, normalize_then_sum, rloo, weighted_sum
from stages.losses.policy import POLICY_LOSSES
from stages.losses.policy_correction import MODES, Correction
from stages.training.advantage_settings import AdvantageConfig
from stages.training.advantages import RewardPenalty, penalized
from stages.training.batch import Branch, Group
from stages.training.entropy_bonus import EntropyBonus, Target
from stages.training.policy import PolicyLoss
from stages.training.policy_known import Rollouts
from stages.training.policy_terms import PolicySettings
from tests.losses.heads import entropy
from tests.oracles.policy_steps import Trainer, run_part
from tests.oracles.steps import Step, agree, gradient_norm, logged
from tests.training.conftest import packing_scorer, tiny_model
from tests.training.test_objectives import plain_logits, rollouts, targets
from tests.training.test_policy import disagreeing, settled

trl = pytest.importorskip("trl", reason="the oracle is an extra: pip install -e '.[benchmarks]'")
from trl.experimental.gmpo import GMPOTrainer  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.rloo_trainer import RLOOTrainer  # noqa: E402

# our loss, its parameters, our other settings, what TRL calls them
CASES: list[tuple[str, dict[str, float], dict[str, Any], dict[str, Any]]] = [
    ("grpo", {}, {}, {}),
    ("bnpo", {}, {}, {}),
    ("dr_grpo", {}, {}, {}),
    ("dapo", {"epsilon_high": 0.28}, {}, {"epsilon_high": 0.28}),
    ("luspo", {}, {}, {"importance_sampling_level": "sequence"}),
    ("cispo", {"epsilon_high": 1.3}, {}, {"epsilon_high": 1.3}),
    ("sapo", {"sapo_temperature_neg": 1.3}, {}, {"sapo_temperature_neg": 1.3}),
    ("vespo", {"vespo_k_pos": 1.5}, {}, {"vespo_k_pos": 1.5}),
    (
        "gspo",
        {"epsilon": 0.1},
        {},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.1},
    ),
    ("gmpo", {"epsilon": 0.35}, {}, {"epsilon_low": 0.35, "epsilon_high": 0.35}),
    # and the variants, each on a loss
    ("grpo", {"delta": 1.25}, {}, {"delta": 1.25}),
    ("luspo", {}, {"importance_sampling_level": "token"}, {}),
    ("dapo", {}, {"beta": 0.3}, {"beta": 0.3}),
    ("dapo", {}, {"beta": 0.3, "use_bias_correction_kl": True}, {"beta": 0.3, "use_bias_correction_kl": True}),
    (
        "grpo",
        {},
        {"beta": 0.3, "use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
        {"beta": 0.3, "use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
    ),
    ("gmpo", {"epsilon": 0.35}, {"beta": 0.3}, {"beta": 0.3, "epsilon_low": 0.35, "epsilon_high": 0.35}),
    ("grpo", {}, {"off_policy_mask_threshold": 0.05}, {"off_policy_mask_threshold": 0.05}),
]
KINDS = {"gmpo": GMPOTrainer}
BY_SEQUENCE = {
    # where ratios are of sequences TRL counts sequences, we their tokens
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "kl",
}
EXTREMES = {
    # extremes over a step depend on its size
    "clip_ratio/low_min",
    "clip_ratio/high_max",
}


class Both:
    """A tiny model's rollouts, for ours as groups and for TRL's as padded tensors."""

    def __init__(self, *, on_policy: bool = False) -> None:
        self.scorer = packing_scorer(tiny_model().double())
        self.groups = disagreeing(rollouts(self.scorer, on_policy=on_policy))
        self.lengths = [len(branch.token_ids) for group in self.groups for branch in group.branches]

    def theirs(self, kind: Any, inputs: dict[str, Tensor], **settings: Any) -> Step:
        logs = [(row / 0.8).log_softmax(-1) for row in plain_logits(self.scorer, self.groups)]
        own = [row.gather(1, ids[:, None])[:, 0] for row, ids in zip(logs, targets(self.groups), strict=True)]
        trainer = Trainer(kind, padded(own), padded([entropy(row) for row in logs]), **settings)
        loss = trainer.loss(inputs)
        return Step(float(loss.detach()), gradient_norm(self.scorer.model, loss), logged(trainer))

    def inputs(self) -> dict[str, Tensor]:
        found = {
            "completion_mask": padded([torch.ones(length) for length in self.lengths]).long(),
            "advantages": torch.tensor([value for group in self.groups for value in group.data.advantages]).double(),
            "ref_per_token_logps": self.values("reference_logprobs"),
            "sampling_per_token_logps": self.values("sampled_logprobs"),
        }
        return found | ({} if self.groups[0].data.old_logprobs is None else {"old_per_token_logps": self.old()})

    def old(self) -> Tensor:
        return self.values("old_logprobs")

    def values(self, field: str) -> Tensor:
        rows = [row for group in self.groups for row in getattr(group.data, field)]
        return padded([torch.tensor(row, dtype=torch.float64) for row in rows])

    def ours(self, settings: PolicySettings, bonus: EntropyBonus | None = None, quantile: float = 1.0) -> Step:
        objective, groups = PolicyLoss(settings, bonus), self.groups
        if bonus is not None or quantile < 1:
            groups = settled(groups, objective, quantile, self.scorer)
        total, metrics = objective(self.scorer, self.scorer.layout(groups))
        loss = total / sum(objective.count(group) for group in groups)
        means = {name: float(one.sum) / float(one.count) for name, one in metrics.items()}
        means |= objective.concluded(means)
        return Step(float(loss.detach()), gradient_norm(self.scorer.model, loss), means)


def padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def settings_of(name: str, parameters: dict[str, float], **others: Any) -> PolicySettings:
    return PolicySettings(
        loss=POLICY_LOSSES[name],
        temperature=0.8,
        max_completion_length=8,
        tolerance=None,
        parameters=parameters,
        **others,
    )


def compare(ours: Step, theirs: Step, *, by_sequence: bool = False) -> None:
    left_out = EXTREMES | (BY_SEQUENCE if by_sequence else set())
    metrics = {name: value for name, value in theirs.metrics.items() if name not in left_out}
    agree(ours, replace(theirs, metrics=metrics))


@pytest.mark.parametrize(("name", "parameters", "others", "named"), CASES)
@pytest.mark.parametrize("on_policy", [True, False])
def test_losses(
    name: str, parameters: dict[str, float], others: dict[str, Any], named: dict[str, Any], on_policy: bool
) -> None:
    both = Both(on_policy=on_policy)
    theirs = both.theirs(KINDS.get(name, GRPOTrainer), both.inputs(), **({"loss_type": name} | named))
    by_sequence = named.get("importance_sampling_level") == "sequence"
    compare(both.ours(settings_of(name, parameters, **others)), theirs, by_sequence=by_sequence)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "sapo"])
@pytest.mark.parametrize("quantile", [1.0, 0.4])
def test_entropy(loss: str, quantile: float) -> None:
    """The bonus, and the tokens of the highest entropy."""
    for coefficient in (0.0, 0.3):
        both = Both()
        named = {"loss_type": loss, "top_entropy_quantile": quantile, "entropy_coef": coefficient}
        bonus = EntropyBonus(coefficient) if coefficient else None
        compare(both.ours(settings_of(loss, {}), bonus, quantile), both.theirs(GRPOTrainer, both.inputs(), **named))


def test_high_entropy_tokens_of_gmpo() -> None:
    """Where every completion has one; of one that has none TRL's loss still has the advantage, without a gradient."""
    both = Both()
    named = {"top_entropy_quantile": 0.9, "epsilon_low": 0.35, "epsilon_high": 0.35}
    compare(
        both.ours(settings_of("gmpo", {"epsilon": 0.35}), None, 0.9), both.theirs(GMPOTrainer, both.inputs(), **named)
    )


def test_adaptive_entropy_coefficient() -> None:
    """Two steps of TRL's controller, whose bonus counts from the second on."""
    for target in (0.5, 50.0):
        both = Both()
        logs = [(row / 0.8).log_softmax(-1) for row in plain_logits(both.scorer, both.groups)]
        own = [row.gather(1, ids[:, None])[:, 0] for row, ids in zip(logs, targets(both.groups), strict=True)]
        adaptive = {"entropy_coef": 0.1, "use_adaptive_entropy": True, "entropy_target": target}
        trainer = Trainer(GRPOTrainer, padded(own), padded([entropy(row) for row in logs]), **adaptive)
        trainer._entropy_window_stats, trainer._last_world_entropy = None, float("inf")
        bonus = EntropyBonus(0.1, Target(target, 0.005, 0.0, 1.0))
        for _ in range(2):
            theirs = trainer.loss(both.inputs())
            ours = both.ours(settings_of("dapo", {}), bonus)
            assert ours.loss == pytest.approx(float(theirs.detach()), rel=1e-9)
            assert ours.metrics["entropy_coef"] == logged(trainer)["entropy_coef"]


# in TRL's code these stand inside the trainer's sampling; the lines themselves are run on the same tensors
@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.startswith("geometric")])
@pytest.mark.parametrize(("low", "high"), [(None, 1.2), (0.7, 1.3), (0.9, None)])
def test_importance_to_the_sampler(mode: str, low: float | None, high: float | None) -> None:
    both = Both()
    inputs = both.inputs()
    trainer = Trainer(GRPOTrainer, inputs["advantages"], inputs["advantages"], loss_type="dapo")
    trainer.vllm_importance_sampling_mode = mode
    trainer.vllm_importance_sampling_clip_max, trainer.vllm_importance_sampling_clip_min = high, low
    names = run_part(
        GRPOTrainer._generate_and_score_completions,
        "per_token_logps_diff = (old",
        "# Compute the per-token log probabilities for the reference",
        self=trainer,
        mask=inputs["completion_mask"],
        old_per_token_logps=both.old(),
        sampling_per_token_logps=inputs["sampling_per_token_logps"],
    )
    inputs["importance_sampling_ratio"] = names["vllm_importance_sampling_ratio"]
    correction = Correction(MODES[mode], low, high)
    for loss in ("dapo", "vespo") if mode.startswith("token") else ("dapo",):
        named = {"loss_type": loss, "use_vllm": True, "vllm_importance_sampling_correction": True}
        ours = both.ours(settings_of(loss, {}, correction=correction))
        compare(ours, both.theirs(GRPOTrainer, inputs, **named))
    ratios = names["vllm_importance_sampling_ratio"]
    chosen = ratios.flatten() if mode.startswith("sequence") else ratios[inputs["completion_mask"].bool()]
    for name, value in (("mean", chosen.mean()), ("min", chosen.min()), ("max", chosen.max())):
        found = ours.metrics[f"sampling/importance_sampling_ratio/{name}"]
        assert found == pytest.approx(float(value), rel=1e-9), name


def test_rloo() -> None:
    both = Both()
    mask = padded([torch.ones(length) for length in both.lengths])
    inputs = both.inputs() | {"old_logps": (both.old() * mask).sum(1)}
    ours = both.ours(settings_of("grpo", {}, importance_sampling_level="sequence_sum"))
    compare(ours, both.theirs(RLOOTrainer, inputs), by_sequence=True)


NAN = float("nan")
REWARDS = torch.tensor(
    [[[1.0, 0.3], [2.0, NAN], [NAN, NAN], [0.5, 2.0]], [[0.0, 1.0], [NAN, 1.0], [0.0, 0.0], [4.0, -1.0]]],
    dtype=torch.float64,
)
WEIGHTS = torch.tensor([1.0, 0.5], dtype=torch.float64)


def part_of_trl(kind: Any, first: str, **settings: Any) -> Tensor:
    flat = REWARDS.reshape(-1, 2)
    trainer = Trainer(kind, flat, flat, reward_weights=WEIGHTS, reward_funcs=[None, None], **settings)
    known = {"rewards_per_func": flat, "num_generations": 4, "device": flat.device, "mode": "train"}
    unscorable = torch.isnan(flat).all(dim=1)
    found = run_part(
        kind._generate_and_score_completions,
        first,
        "# Slice to keep only the local part",
        self=trainer,
        unscorable_mask=unscorable,
        **known,
        **settings.get("names", {}),
    )
    advantages: Tensor = found["advantages"]
    return advantages.reshape(2, 4)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_grpo(scale: Any) -> None:
    theirs = part_of_trl(
        GRPOTrainer,
        "if self.multi_objective_aggregation ==",
        scale_rewards=scale,
        multi_objective_aggregation="sum_then_normalize",
    )
    assert_close(grpo(weighted_sum(REWARDS, WEIGHTS), scale_rewards=scale), theirs, rtol=1e-6, atol=1e-6)


def test_advantages_of_gdpo() -> None:
    theirs = part_of_trl(
        GRPOTrainer, "if self.multi_objective_aggregation ==", multi_objective_aggregation="normalize_then_sum"
    )
    assert_close(normalize_then_sum(REWARDS, WEIGHTS), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_advantages_of_rloo(normalize: bool, beta: float) -> None:
    """With clipped rewards, and the divergence from the reference off them."""
    old = [torch.linspace(-1, -2, length, dtype=torch.float64) for length in (3, 1, 4, 2, 2, 5, 1, 3)]
    reference = [row * 1.1 + 0.05 for row in old]
    mask = padded([torch.ones(len(row)) for row in old])
    names = {
        "old_per_token_logps": padded(old),
        "ref_per_token_logps": padded(reference),
        "completion_mask": mask,
        "gather": lambda values: values,
    }
    theirs = part_of_trl(
        RLOOTrainer,
        "# Apply weights to each reward function's output",
        beta=beta,
        normalize_advantages=normalize,
        reward_clip_range=(-0.5, 2.1),
        names=names,
    )
    totals = weighted_sum(REWARDS, WEIGHTS).clamp(-0.5, 2.1)
    if not beta:
        assert_close(rloo(totals, normalize_advantages=normalize), theirs, rtol=1e-6, atol=1e-6)
        return
    config = AdvantageConfig(advantage_estimator="rloo", normalize_advantages=normalize)
    _, measured = penalized(config, RewardPenalty.of(beta, None), lambda groups: groups)
    groups = measured([_group(totals[p], old[4 * p : 4 * p + 4], reference[4 * p : 4 * p + 4]) for p in (0, 1)])
    ours = torch.tensor([group.data.advantages for group in groups])
    assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)


def _group(totals: Tensor, old: Sequence[Tensor], reference: Sequence[Tensor]) -> Group:
    rows = [tuple(row.tolist() for row in rows) for rows in (old, reference)]
    data = Rollouts(tuple(totals.tolist()), rows[0], rows[0], rows[1])
    return Group("row", (1,), tuple(Branch([1] * len(row)) for row in old), data)
