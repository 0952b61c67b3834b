"""Pairs that the policy makes: of its completions of a prompt, the one with the highest reward and the one with the
lowest; or for XPO one of its own and one of the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stages.context import Context
from stages.data.tokenize import TokenizedPrompt
from stages.training.batch import Group
from stages.training.eos_penalty import penalized
from stages.training.generation import Generation, Sampling
from stages.training.initial import Reference as ReferenceModel
from stages.training.loop import Trainer
from stages.training.objective import Window, Windows, WindowsAround
from stages.training.online_loss import JudgedPair
from stages.training.opponents import ByEpoch, Contest, by_author, margin
from stages.training.pair_windows import PairWindows
from stages.training.pairs import Reference
from stages.training.preference import PairSettings
from stages.training.rollout_drawing import Drawing
from stages.training.rollout_plan import one_step_plan
from stages.training.rollout_records import Sampled
from stages.training.rollout_selection import Selection
from stages.training.rollout_settings import sampler_tolerance
from stages.training.rollout_windows import Learning, RolloutWindows
from stages.training.sampler_check import SamplerCheck


class Judgement:
    """The advantages of two completions a prompt: by how much each is worth more than the other, zeros where that is
    not known. Keeps what it saw last."""

    def __init__(self) -> None:
        self.seen: Sequence[Sampled] = ()

    def __call__(self, sampled: Sequence[Sampled]) -> list[list[float]]:
        """For each of the completions."""
        self.seen = sampled
        margins = map(margin, sampled)
        return [[ahead, -ahead] for ahead in margins]


class OnlinePairs(WindowsAround):
    """Rollouts as pairs: the better completion first, no reference yet. Equal ones teach nothing and are left out,
    unless the reference's completions count by themselves (XPO)."""

    def __init__(self, rollouts: RolloutWindows, judgement: Judgement, exploration: ByEpoch | None = None) -> None:
        super().__init__(rollouts)
        self.rollouts = rollouts
        self.judgement, self.exploration = judgement, exploration

    def window(self, step: int) -> Window:
        """The pairs of a step."""
        window = self.rollouts.window(step)
        alpha = 0.0 if self.exploration is None else self.exploration.at(step)
        seen = zip(window.groups, self.judgement.seen, strict=True)
        pairs = [_judged(group, entry, alpha) for group, entry in seen]
        kept = [pair for pair in pairs if self.exploration is not None or pair.data.told_apart]
        gaps = [max(group.data.advantages) for group in window.groups]
        metrics = {name: value for name, value in window.metrics.items() if name != "reward_std"}
        if "reward" in metrics:
            metrics["objective/scores"] = metrics["reward"]
        metrics["objective/scores_margin"] = sum(gaps) / self.rollouts.plan.prompts_per_step
        metrics["val/contain_eos_token"] = 1 - metrics["completions/clipped_ratio"]
        if self.exploration is not None:
            metrics |= {"alpha": alpha, **by_author(self.judgement.seen)}
        return replace(window, groups=kept, uncounted_items=float(len(pairs) - len(kept)), metrics=metrics)


def _judged(group: Group, entry: Sampled, alpha: float) -> Group:
    """The better completion first; `alpha` is the weight of the second one that was sampled."""
    places = (1, 0) if group.data.advantages[0] < 0 else (0, 1)
    data = JudgedPair(
        *(0.0, 0.0),
        rewards=(entry.totals[places[0]], entry.totals[places[1]]),
        exploration=(alpha * places[0], alpha * places[1]),
    )
    return replace(group, branches=tuple(group.branches[place] for place in places), data=data)


class ReferencedPairs(PairWindows):
    """Pairs with their sums under a reference that stays."""

    def __init__(
        self,
        windows: Windows,
        trainer: Trainer,
        settings: PairSettings,
        reference: ReferenceModel,
    ) -> None:
        super().__init__(windows, trainer, settings)
        self.reference = reference

    def present(self, groups: Sequence[Group]) -> list[Reference]:
        """Of every pair."""
        with self.reference() as scorer:
            return self.referenced(scorer, groups)


def online_pairs(
    context: Context,
    prompts: Sequence[TokenizedPrompt],
    trainer: Trainer,
    tokenizer: Any,
    reference: ReferenceModel | None,
) -> OnlinePairs:
    """Of a stage's configuration: two completions of every prompt are kept, those furthest apart. With xpo_alpha there
    are two, one of them the `reference`'s."""
    config: Any = context.config
    plan = one_step_plan(
        config,
        num_generations=config.num_generations,
        selection=Selection(trained=2, dynamic_sampling_rounds=config.dynamic_sampling_rounds),
    )
    generation, own, exploration = Generation.of(context, trainer, tokenizer, config), None, None
    if config.explores:
        assert reference is not None and isinstance(generation.sampling, Sampling)
        generation, own = replace(generation, sampling=Contest(generation.sampling, reference)), 1
        exploration = ByEpoch(config.xpo_alpha, plan.prompts_per_step, len(prompts))
    generate, judgement = penalized(generation, config.missing_eos_penalty), Judgement()
    check = SamplerCheck(trainer, temperature=config.temperature, tolerance=sampler_tolerance(config), completions=own)
    # which pairs teach nothing is for OnlinePairs to say
    learning = Learning(judgement, check, lambda _: 1.0, skippable=False)
    rollouts = RolloutWindows(context, Drawing(prompts, plan, generate), plan, learning)
    return OnlinePairs(rollouts, judgement, exploration)
