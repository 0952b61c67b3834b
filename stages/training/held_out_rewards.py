"""What completions of held-out prompts earn while a policy is trained on others. They are looked at and not kept: no
record of the rollouts is of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import partial
from typing import Any, ClassVar

from artifacts.errors import StageError
from stages.context import Context
from stages.data.ledger import RowLedger
from stages.data.open_prompts import open_prompts
from stages.data.tokenize import TokenizedPrompt
from stages.data.types import Dataset
from stages.training.eos_penalty import MissingEosPenalty, penalized
from stages.training.generation import Generation
from stages.training.global_random import kept_random_numbers
from stages.training.held_out import INPUT, PREFIX, Measured, named, read_apart, say_known, when
from stages.training.held_out_sampling import held_out_sampling, held_out_seeds
from stages.training.lessons import TaughtGeneration
from stages.training.loop import Trainer
from stages.training.multi_turn import with_tools
from stages.training.objective import Windows
from stages.training.out_of_memory import trim_heap
from stages.training.rollout_drawing import Drawing, Generate
from stages.training.rollout_metrics import OF_GROUPS, rollout_metrics
from stages.training.rollout_records import Sampled
from stages.training.rollout_windows import RolloutWindows
from stages.training.rollouts_ahead import Ahead

REWARD = "reward"


@dataclass(frozen=True)
class HeldOutRewards(Measured):
    """Prompts, and how they are completed and scored."""

    prompts: Sequence[TokenizedPrompt]
    seeds: Sequence[tuple[int, ...]]
    generate: Generate
    in_turn: Callable[[Callable[[], list[Sampled]]], list[Sampled]] = lambda job: job()
    """Has it done when the engine has time and the present weights."""
    also: str | None = None
    """Another name of the reward: what it is called where the stage's own has completions of others in it."""

    metric: ClassVar[str] = f"{PREFIX}{REWARD}"
    largest: ClassVar[bool] = True
    at_start: ClassVar[bool] = True

    def measure(self, trainer: Trainer, windows: Windows) -> dict[str, float]:
        """Rewards and lengths, as those of rollouts. Raises StageError where nothing was scored."""
        trim_heap()
        with kept_random_numbers():  # reward functions are other people's
            sampled = self._sampled()
        trim_heap()
        found = rollout_metrics(sampled)
        if REWARD not in found:
            raise StageError(f"input {INPUT}: no completion has a reward")
        if len(self.seeds[0]) == 1:
            found = {name: value for name, value in found.items() if name not in OF_GROUPS}
        if self.also is not None:
            found[self.also] = found[REWARD]
        return named(found)

    def _sampled(self) -> list[Sampled]:
        try:
            return self.in_turn(lambda: self.generate(self.prompts, self.seeds))
        except StageError as error:
            if type(error) is not StageError:  # others say what may be tried again
                raise
            raise StageError(f"input {INPUT}: {error}") from error


def held_out_rewards(
    context: Context, trainer: Trainer, tokenizer: Any, rollouts: RolloutWindows
) -> HeldOutRewards | None:
    """Input `eval_dataset`, where it is wired in: completed by the policy that makes the `rollouts`, and rewarded as
    they are. Prompts that are trained on too are said."""
    if not context.has(INPUT):
        return None
    config, plan, drawing, more = context.config, rollouts.plan, rollouts.drawing, when(context.config)
    if isinstance(drawing, Ahead):
        more["in_turn"] = drawing.between
        drawing = drawing.drawing
    assert isinstance(drawing, Drawing), "the stage's check lets no others be measured"
    generation, penalty = _parts(drawing.generate)
    policy = generation.sampling.policy
    read = partial(_prompts, trainer, tokenizer, config, with_tools(policy.multi_turn))
    prompts = read_apart(context, trainer.scorer.vocabulary, read)
    say_known(context, map(_tokens, prompts), map(_tokens, drawing.prompts), metric=REWARD)
    alone = policy is generation.sampling
    completions = plan.prompts_per_generation * (plan.num_generations if alone else 1)
    sampling = held_out_sampling(policy, config, completions=completions)
    return HeldOutRewards(
        prompts,
        held_out_seeds(config, prompts),
        penalized(changed(generation, sampling=sampling), penalty),
        also=context.stage.main_metric if context.stage.main_metric != REWARD else None,
        **more,
    )


def _prompts(
    trainer: Trainer, tokenizer: Any, config: Any, complete: Any, dataset: Dataset, ledger: RowLedger
) -> list[TokenizedPrompt]:
    found = open_prompts(config, dataset, tokenizer, trainer.scorer.context_length, ledger, complete=complete)
    return found[: config.eval_max_prompts]


def _parts(generate: Generate) -> tuple[Generation, float | None]:
    """What samples and scores, and what it takes off the reward of completions without an end."""
    if isinstance(generate, MissingEosPenalty):
        return _parts(generate.generate)[0], generate.penalty
    if isinstance(generate, TaughtGeneration):
        return _parts(generate.generate)
    assert isinstance(generate, Generation)
    return generate, None


def _tokens(prompt: TokenizedPrompt) -> tuple[int, ...]:
    return tuple(prompt.prompt_ids)
