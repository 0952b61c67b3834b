"""The objective of on-line learning on a tiny model: ratios on policy, entropy, corrections and masks against the same
loss written out on the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.policy import POLICY_LOSSES
from stages.losses.policy_correction import MODES, Correction, on_policy_enough
from stages.losses.policy_kl import KL_ESTIMATORS
from stages.losses.policy_tokens import LOG_RATIOS, PolicyTokens, Sequences
from stages.training.batch import Group
from stages.training.entropy_bonus import EntropyBonus, StepEntropy, Target
from stages.training.model import Scorer
from stages.training.policy import PolicyLoss
from stages.training.policy_terms import PolicySettings
from tests.losses.heads import entropy
from tests.training.conftest import tiny_model
from tests.training.test_objectives import SETTINGS, agree, gradients, plain_logits, rollouts, targets

PARAMETERS: dict[str, dict[str, float]] = {"cispo": {"epsilon_high": 1.1}}
MODE_NAMES = list(MODES)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(tiny_model().double())


def of_loss(name: str, **changes: Any) -> PolicySettings:
    return replace(SETTINGS, loss=POLICY_LOSSES[name], parameters=PARAMETERS.get(name, {}), **changes)


def disagreeing(groups: Sequence[Group]) -> list[Group]:
    """With a sampler that gave other log-probabilities than the trainer would have."""
    return [
        replace(
            group,
            data=replace(
                group.data,
                sampled_logprobs=tuple(
                    [value - 0.25 * (-1) ** (t + place) for t, value in enumerate(row)]
                    for place, row in enumerate(group.data.sampled_logprobs)
                ),
            ),
        )
        for group in groups
    ]


class Written:
    """The loss of groups as whole tensors."""

    def __init__(self, scorer: Scorer, groups: list[Group], settings: PolicySettings) -> None:
        self.settings, self.groups = settings, groups
        logs = [(row / settings.temperature).log_softmax(-1) for row in plain_logits(scorer, groups)]
        own = [row.gather(1, ids[:, None])[:, 0] for row, ids in zip(logs, targets(groups), strict=True)]
        self.logprobs, self.entropies = torch.cat(own), torch.cat([entropy(row) for row in logs])
        self.lengths = torch.tensor([len(row) for row in own])
        self.sequences = Sequences(torch.arange(len(own)).repeat_interleave(self.lengths), len(own))
        on_policy = groups[0].data.old_logprobs is None
        self.old = self.logprobs.detach() if on_policy else self.values("old_logprobs")
        self.weights = settings.loss.aggregation.weights(self.lengths, self.sequences.of_N, 8, torch.float64)

    def values(self, field: str, dtype: torch.dtype = torch.float64) -> Tensor:
        rows = [row for group in self.groups for row in getattr(group.data, field)]
        return torch.tensor([value for row in rows for value in row], dtype=dtype)

    def loss(self) -> Tensor:
        """Summed, without an entropy bonus."""
        settings, changes = self.settings, self.logprobs - self.old
        advantages = torch.tensor([value for group in self.groups for value in group.data.advantages]).double()
        level = LOG_RATIOS[settings.importance_sampling_level or settings.loss.level]
        ratios, advantages = level(changes, self.sequences), self.sequences.to_tokens(advantages)
        sampled, corrections, kept = self.values("sampled_logprobs"), None, None
        if settings.correction is not None:
            corrections = settings.correction(self.old, sampled, self.sequences)
        if self.groups[0].data.kept is not None:
            kept = self.values("kept", torch.bool)
        tokens = PolicyTokens(ratios, changes, self.logprobs, advantages, self.sequences, kept, corrections)
        losses = settings.loss.with_settings(settings.parameters)(tokens)
        if corrections is not None and not settings.loss.weighs_corrections:
            losses = losses * corrections
        if kept is not None:
            losses = losses * kept
        if (threshold := settings.off_policy_mask_threshold) is not None:
            losses = losses * on_policy_enough(self.logprobs, sampled, advantages, self.sequences, threshold)
        if settings.beta:
            kl = KL_ESTIMATORS[settings.kl_estimator](self.logprobs, self.values("reference_logprobs"))
            losses = losses + settings.beta * (kl * ratios.exp() if settings.use_bias_correction_kl else kl)
        return (losses * self.weights).sum()


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("mode", [None, "token_truncate", "sequence_truncate"])
def test_losses(scorer: Scorer, name: str, on_policy: bool, mode: str | None) -> None:
    """Formed token by token or from all log-probabilities together: the same loss and gradients."""
    if name == "vespo" and mode == "sequence_truncate":
        mode = "token_mask"
    correction = None if mode is None else Correction(MODES[mode], 0.8, 1.2)
    settings = of_loss(name, correction=correction, beta=0.1, kl_estimator="k2")
    groups = disagreeing(rollouts(scorer, on_policy=on_policy))
    agree(scorer, PolicyLoss(settings), groups, Written(scorer, groups, settings).loss())


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("on_policy", [True, False])
def test_cutting_up_a_step_changes_nothing(scorer: Scorer, name: str, on_policy: bool) -> None:
    """Losses, gradients and items of its groups add up to its own."""
    objective = PolicyLoss(of_loss(name, beta=0.1, correction=Correction(MODES["token_truncate"], 0.8, 1.2)))
    groups = disagreeing(rollouts(scorer, on_policy=on_policy))

    def step(*parts: list[Group]) -> tuple[Tensor, list[Tensor], float]:
        loss = torch.stack([objective(scorer, scorer.layout(part))[0] for part in parts]).sum()
        return loss.detach(), gradients(scorer, loss), sum(objective.count(group) for part in parts for group in part)

    whole, apart = step(groups), step(groups[:1], groups[1:])
    assert whole[2] == apart[2]
    assert_close(apart[0], whole[0], rtol=1e-9, atol=1e-9)
    for gradient, other in zip(apart[1], whole[1], strict=True):
        assert_close(gradient, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("corrected", [False, True])
def test_on_policy_every_ratio_is_exactly_one(scorer: Scorer, name: str, corrected: bool) -> None:
    """As the objective sees them, whichever way it goes; and nothing is clipped."""
    single = Correction(MODES["token_truncate"], None, 3.0) if corrected else None
    for threshold in (None, 10.0):
        settings = of_loss(name, correction=single, off_policy_mask_threshold=threshold)
        seen: list[Tensor] = []

        def look(tokens: PolicyTokens, seen: list[Tensor] = seen) -> Tensor:
            seen.append(tokens.log_ratios_N)
            return tokens.log_ratios_N

        objective = PolicyLoss(settings)
        objective.metrics = {**objective.metrics, "look": look}
        groups = rollouts(scorer, on_policy=True)
        _, metrics = objective(scorer, scorer.layout(groups))
        assert seen and all((ratios == 0).all() for ratios in seen)
        assert all(float(mean.sum) == 0 for key, mean in metrics.items() if "clip" in key)
        if name == "vespo" and not corrected:
            assert float(metrics["vespo/phi_seq_mean"].sum) == metrics["vespo/phi_seq_mean"].count


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("on_policy", [True, False])
def test_corrections_and_their_metrics(scorer: Scorer, mode: str, on_policy: bool) -> None:
    settings = of_loss("dapo", correction=Correction(MODES[mode], None, 1.2))
    groups = disagreeing(rollouts(scorer, on_policy=on_policy))
    written = Written(scorer, groups, settings)
    metrics = agree(scorer, PolicyLoss(settings), groups, written.loss())
    sampled = written.values("sampled_logprobs")
    assert settings.correction is not None
    ratios = settings.correction(written.old, sampled, written.sequences)
    by_token = mode.startswith("token")
    mean = ratios.mean() if by_token else written.sequences.means(ratios).mean()
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(float(mean), rel=1e-9)
    differences = (written.old - sampled).abs().detach()
    named = {
        "sampling_logp_difference/mean": differences.mean(),
        "sampling_logp_difference/max": differences.max(),
        "importance_sampling_ratio/min": ratios.min(),
        "importance_sampling_ratio/max": ratios.max(),
    }
    for name, value in named.items():
        assert metrics[f"sampling/{name}"] == pytest.approx(float(value), rel=1e-9), name


@pytest.mark.parametrize("on_policy", [True, False])
def test_off_policy_completions_are_masked(scorer: Scorer, on_policy: bool) -> None:
    settings = of_loss("grpo", off_policy_mask_threshold=0.05)
    groups = disagreeing(rollouts(scorer, on_policy=on_policy))
    agree(scorer, PolicyLoss(settings), groups, Written(scorer, groups, settings).loss())
    masked, plain = (Written(scorer, groups, one).loss().item() for one in (settings, of_loss("grpo")))
    assert masked != plain


@pytest.mark.parametrize("level", LOG_RATIOS)
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_terms(scorer: Scorer, level: str, estimator: str) -> None:
    settings = of_loss(
        "grpo", beta=0.3, kl_estimator=estimator, importance_sampling_level=level, use_bias_correction_kl=True
    )
    for on_policy in (True, False):
        groups = rollouts(scorer, on_policy=on_policy)
        agree(scorer, PolicyLoss(settings), groups, Written(scorer, groups, settings).loss())


def test_a_divergence_that_counts_in_the_reward_is_logged(scorer: Scorer) -> None:
    settings = of_loss("grpo", compares_reference=True, kl_estimator="k1")
    groups = rollouts(scorer, on_policy=True)
    written = Written(scorer, groups, settings)
    metrics = agree(scorer, PolicyLoss(settings), groups, written.loss())
    difference = (written.logprobs - written.values("reference_logprobs")).mean()
    assert metrics["kl"] == pytest.approx(float(difference.detach()), rel=1e-9)


def settled(groups: list[Group], objective: PolicyLoss, quantile: float, scorer: Scorer) -> list[Group]:
    """As a step's groups come to the loss."""
    entropies = Written(scorer, groups, SETTINGS).entropies.detach().tolist()
    given = iter(entropies)

    def measure(some: list[Group]) -> list[tuple[list[float], ...]]:
        return [tuple([next(given) for _ in branch.token_ids] for branch in group.branches) for group in some]

    return StepEntropy(objective.count, quantile, measure)(groups)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "gmpo"])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("quantile", [1.0, 0.4])
def test_entropy_bonus(scorer: Scorer, name: str, on_policy: bool, quantile: float) -> None:
    """Off the loss comes coefficient x mean entropy of the kept tokens of the step, however the step is cut up."""
    settings = of_loss(name)
    objective = PolicyLoss(settings, EntropyBonus(0.3))
    groups = settled(rollouts(scorer, on_policy=on_policy), objective, quantile, scorer)
    written = Written(scorer, groups, settings)
    items = sum(objective.count(group) for group in groups)
    kept = written.values("kept", torch.bool) if quantile < 1 else torch.ones(len(written.logprobs), dtype=torch.bool)
    threshold = torch.quantile(written.entropies.detach(), 1 - quantile)
    assert quantile == 1 or torch.equal(kept, written.entropies.detach() >= threshold)
    policy = written.loss()
    expected = policy - 0.3 * items * written.entropies[kept].mean()
    metrics = agree(scorer, objective, groups, expected)
    assert metrics["policy_loss"] == pytest.approx(policy.item() / items, rel=1e-9)
    whole, _ = objective(scorer, scorer.layout(groups))
    wanted = gradients(scorer, whole)
    total = sum(objective(scorer, scorer.layout(part))[0] for part in (groups[:1], groups[1:]))
    assert_close(total, whole, rtol=1e-9, atol=1e-9)
    for gradient, other in zip(gradients(scorer, total), wanted, strict=True):
        assert_close(gradient, other, rtol=1e-7, atol=1e-9)


def test_only_high_entropy_tokens_are_learned_from(scorer: Scorer) -> None:
    settings = of_loss("dapo", beta=0.1)
    groups = settled(rollouts(scorer, on_policy=True), PolicyLoss(settings), 0.3, scorer)
    written = Written(scorer, groups, settings)
    agree(scorer, PolicyLoss(settings), groups, written.loss())
    kept = written.values("kept", torch.bool)
    assert 0.25 <= float(kept.double().mean()) <= 0.4


def test_an_adaptive_coefficient_by_hand() -> None:
    bonus = EntropyBonus(0.01, Target(entropy=0.5, delta=0.005, lowest=0.0, highest=0.012))
    seen = []
    for entropy_of_step in (0.4, 0.3, 0.7, 0.8, 0.9, 0.2):
        seen.append(bonus.applied())
        bonus.follow(entropy_of_step)
    # none in the first step; 0.012 is the most; none where the step before was above the target; from 0 up again
    assert seen == pytest.approx([0.0, 0.012, 0.012, 0.0, 0.0, 0.0])
    assert bonus.coefficient == pytest.approx(0.005)
    assert bonus.applied() == pytest.approx(0.005)


def test_a_coefficient_that_is_taken_up_again_goes_on() -> None:
    target = Target(entropy=0.5, delta=0.005, lowest=0.0, highest=1.0)
    whole, first = PolicyLoss(SETTINGS, EntropyBonus(0.01, target)), PolicyLoss(SETTINGS, EntropyBonus(0.01, target))
    for entropy_of_step in (0.4, 0.6):
        whole.concluded({"entropy": entropy_of_step})
        first.concluded({"entropy": entropy_of_step})
    second = PolicyLoss(SETTINGS, EntropyBonus(0.01, target))
    second.load(first.state())
    for entropy_of_step in (0.3, 0.2):
        assert whole.concluded({"entropy": entropy_of_step}) == second.concluded({"entropy": entropy_of_step})
    assert whole.bonus == second.bonus
    fresh = PolicyLoss(SETTINGS, EntropyBonus(0.01, target))
    fresh.load(PolicyLoss(SETTINGS, EntropyBonus(0.01, target)).state())
    assert fresh.bonus == EntropyBonus(0.01, target)
