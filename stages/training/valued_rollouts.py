"""What PPO learns from: every token's value, its advantage (GAE), and the return that was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from artifacts.errors import StageError
from stages.context import Context
from stages.data.tokenize import TokenizedPrompt
from stages.losses.advantages import generalized_advantages, whitened
from stages.losses.policy_correction import Correction
from stages.losses.value import adapted_kl_coef, token_rewards
from stages.training.batch import Group, TokenBatch
from stages.training.eos_penalty import penalized
from stages.training.generation import Generation
from stages.training.language_modeling import asked_tokens
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.objective import Window
from stages.training.out_of_memory import TokenBudget
from stages.training.passes import without_gradients
from stages.training.reference import branch_logprobs
from stages.training.rollout_drawing import Drawing
from stages.training.rollout_metrics import OF_GROUPS
from stages.training.rollout_plan import Plan
from stages.training.rollout_records import Sampled
from stages.training.rollout_settings import sampler_tolerance
from stages.training.rollout_windows import Learning, RolloutWindows
from stages.training.token_table import TokenTable, ValuedRollouts
from stages.training.value_model import logprobs_and_values, per_branch


@dataclass(frozen=True)
class ValueSettings:
    """How rewards become advantages and returns; fields of the stage."""

    gamma: float
    lam: float
    whiten_rewards: bool
    kl_estimator: str
    kl_target: float | None
    kl_horizon: int
    temperature: float
    tolerance: float | None
    """Largest difference of sampler and trainer, in nats a token."""
    correction: Correction | None = None


def scores_of(sampled: Sequence[Sampled]) -> list[list[float]]:
    """Every completion's reward, to be spread over its tokens later. Raises StageError where there is none: a
    completion has no group that it could be left out of."""
    scores = []
    for entry in sampled:
        found = [total for total in entry.totals if total is not None]
        if len(found) < len(entry.totals):
            raise StageError(
                f"no reward function scored completion {entry.totals.index(None)} of row {entry.prompt.row_id} (all "
                "gave None); PPO needs a number for every completion"
            )
        scores.append(found)
    return scores


class Valuation:
    """Measures a generation: log-probabilities under policy and reference, values, advantages, returns."""

    def __init__(
        self,
        trainer: Trainer,
        reference: Callable[[], AbstractContextManager[Scorer]] | None,
        settings: ValueSettings,
        kl_coef: float,
    ) -> None:
        self.trainer, self.reference, self.settings, self.kl_coef = trainer, reference, settings, kl_coef
        self.budget = TokenBudget(trainer.context, trainer.config.micro_batch_tokens)
        self.metrics: dict[str, float] = {}

    def __call__(self, groups: list[Group]) -> list[Group]:
        """The groups with ValuedRollouts."""
        policy = self._policy(groups)
        old, values = [logprobs for logprobs, _ in policy], [found for _, found in policy]
        reference = None
        if self.reference is not None:
            with self.reference() as scorer:
                scored = branch_logprobs(scorer, groups, self.budget, temperature=self.settings.temperature)
            reference = [[logprobs for logprobs, _ in branches] for branches in scored]
        flat = TokenTable.of(groups, old, values, reference)
        advantages_ST, returns_ST = self._advantages(flat)
        return flat.groups_with(advantages_ST, returns_ST)

    def _policy(self, groups: list[Group]) -> list[tuple[list[list[float]], list[list[float]]]]:
        """(log-probabilities, values) by group and branch; they must agree with the sampler's."""
        results: list[Any] = [None] * len(groups)
        scorer = self.trainer.policy()

        def compute(indices: list[int], batch: TokenBatch) -> None:
            scores, values_N = scorer(batch, logprobs_and_values(batch, temperature=self.settings.temperature))
            logprobs, values = per_branch(batch, scores.logprobs_N), per_branch(batch, values_N)
            start = 0
            for index in indices:
                stop = start + len(groups[index].branches)
                results[index] = (logprobs[start:stop], values[start:stop])
                start = stop

        scorer.eval()
        without_gradients(scorer, groups, self.budget, compute)
        return results

    def _advantages(self, flat: TokenTable) -> tuple[Tensor, Tensor]:
        settings = self.settings
        difference = flat.compare(settings.tolerance)
        kl_ST = flat.divergences(settings.kl_estimator)
        rewards_ST = token_rewards(kl_ST, flat.scores_S, flat.lengths_S, kl_coef=self.kl_coef)
        # what vLLM drew for a form does not compare
        sampling = {} if math.isnan(difference) else {"sampling/sampling_logp_difference/mean": difference}
        self.metrics = flat.metrics(kl_ST, self.kl_coef) | sampling
        if settings.whiten_rewards:
            rewards_ST = flat.on_tokens(partial(whitened, shift_mean=False), rewards_ST)
        advantages_ST, returns_ST = generalized_advantages(
            rewards_ST, flat.values_ST, flat.lengths_S, gamma=settings.gamma, lam=settings.lam
        )
        if settings.kl_target is not None:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef,
                self.metrics["objective/kl"],
                target=settings.kl_target,
                horizon=settings.kl_horizon,
                sequences=len(flat.lengths_S),
            )
        return self._corrected(flat, flat.on_tokens(whitened, advantages_ST)), returns_ST

    def _corrected(self, flat: TokenTable, advantages_ST: Tensor) -> Tensor:
        """Advantages that make the policy loss, which is linear in them, what the correction makes of it."""
        if self.settings.correction is None:
            return advantages_ST
        ratios_ST, measured = flat.corrections(self.settings.correction)
        found = {"mean": measured.mean(), "min": measured.min(), "max": measured.max()}
        self.metrics |= {f"sampling/importance_sampling_ratio/{name}": float(value) for name, value in found.items()}
        return advantages_ST * ratios_ST

    def state(self) -> dict[str, Any]:
        """JSON values that a resumed run needs."""
        return {"kl_coef": self.kl_coef, "metrics": dict(self.metrics)}

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.kl_coef, self.metrics = state["kl_coef"], state["metrics"]


def forget_old_on_policy(groups: list[Group], on_policy: bool) -> list[Group]:
    """On policy, ratios compare with nothing: they are exactly 1, whatever rounding does to log-probabilities."""
    if not on_policy:
        return groups
    return [replace(group, data=replace(group.data, old_logprobs=None)) for group in groups]


class ValuedWindows:
    """Windows of rollouts, with the metrics and the state of their valuation."""

    def __init__(self, rollouts: RolloutWindows, valuation: Valuation) -> None:
        self.rollouts, self.valuation = rollouts, valuation
        self.total_steps = rollouts.total_steps

    def window(self, step: int) -> Window:
        """The groups of a step, and TRL's metrics of the generation that they are of."""
        window = self.rollouts.window(step)
        metrics = {name: value for name, value in window.metrics.items() if name not in OF_GROUPS}
        plan = self.rollouts.plan
        completions = plan.prompts_per_generation
        metrics["val/num_eos_tokens"] = completions * (1 - metrics["completions/clipped_ratio"])
        metrics["episode"] = float((step // plan.steps_per_batch + 1) * completions)
        return replace(window, metrics=metrics | self.valuation.metrics)

    def state(self) -> dict[str, Any]:
        """Of both."""
        return {"rollouts": self.rollouts.state(), "valuation": self.valuation.state()}

    def tensors(self) -> dict[str, Tensor]:
        """Nothing to save."""
        return {}

    def load(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""
        if state:
            self.rollouts.load(state["rollouts"], tensors)
            self.valuation.load(state["valuation"])


def valued_windows(
    context: Context,
    prompts: Sequence[TokenizedPrompt],
    trainer: Trainer,
    tokenizer: Any,
    reference: Callable[[], AbstractContextManager[Scorer]] | None,
) -> ValuedWindows:
    """Of a stage's configuration: one completion of every prompt."""
    config: Any = context.config
    settings = ValueSettings(
        **{name: getattr(config, name) for name in ("gamma", "lam", "whiten_rewards", "kl_estimator", "temperature")},
        kl_target=config.kl_target,
        kl_horizon=config.kl_horizon,
        tolerance=sampler_tolerance(config),
        correction=config.correction,
    )
    valuation = Valuation(trainer, reference, settings, config.kl_coef)
    plan = Plan(
        prompts_per_step=config.train_batch_size,
        num_generations=1,
        steps_per_generation=config.num_mini_batches,
        num_iterations=config.num_ppo_epochs,
        mask_truncated=False,
        seed=config.seed,
        epochs=config.num_train_epochs,
        max_steps=config.max_steps,
    )
    generate = penalized(Generation.of(context, trainer, tokenizer, config), config.missing_eos_penalty)
    learning = Learning(
        scores_of, valuation, asked_tokens, skippable=False, of_step=forget_old_on_policy, data=ValuedRollouts
    )
    return ValuedWindows(RolloutWindows(context, Drawing(prompts, plan, generate), plan, learning), valuation)
