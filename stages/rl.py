"""On-line reinforcement learning: GRPO, RLOO and relatives, with rollouts of the model that is being trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from artifacts.errors import RequestError
from stages.data.open_prompts import open_prompts
from stages.data.types import PROMPT_TYPES
from stages.rollouts.engine_problems import engine_problems
from stages.rollouts.engine_settings import CorrectedEngineChoice
from stages.rollouts.multi_turn.settings import MultiTurnConfig, multi_turn_problems
from stages.rollouts.reward_spec import unknown_rewards
from stages.stage import MODELS, Input, Stage
from stages.training.advantage_settings import AdvantageConfig, advantage_problems
from stages.training.config import PolicyConfig, policy_outputs
from stages.training.eval_settings import held_out_problems
from stages.training.memory import same_shape
from stages.training.memory_head import HeadUse
from stages.training.memory_online import longest_prompt, online_phases
from stages.training.memory_phase import Phase
from stages.training.memory_request import Request
from stages.training.memory_sampling import Sampled
from stages.training.overlap_settings import overlap_problems
from stages.training.policy_settings import PolicyLossConfig, policy_problems
from stages.training.replay_settings import replay_problems
from stages.training.rollout_settings import GroupedRolloutConfig, dropout_problems, reward_problems, sampler_tolerance
from stages.training.selection_settings import SelectionConfig, selection_problems

if TYPE_CHECKING:
    from stages.context import Context
    from stages.data.ledger import RowLedger
    from stages.data.tokenize import TokenizedPrompt
    from stages.data.types import Dataset


class Config(
    CorrectedEngineChoice,
    PolicyLossConfig,
    AdvantageConfig,
    SelectionConfig,
    GroupedRolloutConfig,
    MultiTurnConfig,
    PolicyConfig,
):
    """Settings of on-line reinforcement learning. An item of train_batch_size is a completion."""


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration and the inputs together."""
    replayed = "rollouts" in wired
    # of rewards that were recorded nobody knows the number here
    rewards = config.rewards, config.reward_weights, wired
    problems = unknown_rewards(config.rewards) if replayed else reward_problems(*rewards)
    problems += replay_problems(config, wired) + engine_problems(config, config)
    problems += overlap_problems(config)
    problems += selection_problems(config, config.num_generations) + multi_turn_problems(config, wired)
    if config.train_batch_size % _trained(config):
        name = "num_generations" if config.num_trained_generations is None else "num_trained_generations"
        problems.append(f"train_batch_size {config.train_batch_size} is no multiple of {name} {_trained(config)}")
    problems += policy_problems(
        config, ever_off_policy=replayed or _is_reused(config) or sampler_tolerance(config) is None
    )
    problems += advantage_problems(config, kl_in_reward=config.penalizes_reward)
    problems += dropout_problems(config) + held_out_problems(config, wired)
    if "reference" in wired and not config.beta:
        problems.append("input reference is wired in, but beta is 0, so it would not be used")
    return problems


def run(context: Context) -> None:
    """Train input `model` on the prompts of input `dataset`, rewarded by functions and input `reward_model`, or on what
    input `rollouts` recorded."""
    from stages.data.ledger import RowLedger
    from stages.training.advantages import RewardPenalty, advantages_of, penalized
    from stages.training.initial import reference_of
    from stages.training.measuring import every_branch, measure_groups, only_where
    from stages.training.online_run import train_on_rollouts
    from stages.training.policy import PolicyLoss
    from stages.training.policy_step import step_of
    from stages.training.replaying import drawing_of, of_old_weights
    from stages.training.rollout_plan import grouped_plan
    from stages.training.rollout_windows import Learning, RolloutWindows, has_advantages
    from stages.training.start import start

    config: Config = context.config
    settings = config.policy_settings(
        temperature=config.temperature, longest=config.max_completion_length, tolerance=sampler_tolerance(config)
    )
    objective = PolicyLoss(settings, config.entropy_bonus())
    trainer, tokenizer = start(context, config, objective)
    reference = reference_of(context, trainer) if config.beta else None
    ledger = RowLedger()
    plan = grouped_plan(config, trained=_trained(config), selection=config.selection())
    drawing = drawing_of(trainer, tokenizer, plan, ledger)
    # completions that come again are off policy, and a batch knows the old log-probabilities of all or of none
    reuse = _is_reused(config)
    old = drawing.on_policy and (reuse or config.penalizes_reward)
    skippable = not config.penalizes_loss and not config.has_entropy_bonus and trainer.balance is None
    # a penalty makes advantages of what is measured
    every = config.penalizes_reward or not skippable
    compared = every_branch if every else only_where(has_advantages)
    measure = measure_groups(trainer, reference, config, old=old, compared=compared)
    if not drawing.on_policy:
        measure = of_old_weights(measure)
    advantages = advantages_of(config)
    if config.penalizes_reward:
        penalty = RewardPenalty.of(config.beta, config.kl_estimator)
        advantages, measure = penalized(config, penalty, measure)
    windows = RolloutWindows(
        context,
        drawing,
        plan,
        Learning(
            advantages=advantages,
            measure=measure,
            count=objective.count,
            skippable=skippable,
            of_step=step_of(trainer, objective, config),
        ),
    )
    train_on_rollouts(context, trainer, tokenizer, windows, windows, ledger)


def _trained(config: Config) -> int:
    """Completions of a group that are trained."""
    return config.num_trained_generations or config.num_generations


def _is_reused(config: Config) -> bool:
    """Whether completions are trained on after their first step."""
    return config.steps_per_generation * config.num_iterations > 1 or config.replay_buffer_size > 0


def tokenized(
    config: Config, dataset: Dataset, tokenizer: Any, context_length: int, ledger: RowLedger
) -> list[TokenizedPrompt]:
    """Raises RequestError where prompts are not all that a model reads."""
    if config.tools or config.environment is not None:
        raise RequestError(
            f"prompts of this stage get what its {'tools' if config.tools else 'environment'} add when it runs; they "
            "cannot be shown before"
        )
    return open_prompts(config, dataset, tokenizer, context_length, ledger)


def memory(request: Request) -> list[Phase]:
    """Sampling, the passes of reward model and reference, and the steps."""
    config, prompt = request.config, longest_prompt(request)
    group = prompt + _trained(config) * config.max_completion_length
    groups = config.train_batch_size // _trained(config)
    reference = request.models.get("reference", request.model) if config.beta else None
    completions = groups * config.num_generations * config.steps_per_generation
    scored = request.passes(row=group, rows=groups * config.steps_per_generation)
    return online_phases(
        request,
        reference=reference,
        asked=Sampled(
            -(-completions // request.setup.processes),
            prompt,
            config.max_completion_length,
            config.num_generations,
            sorts=config.top_p < 1,
        ),
        scored=[(reference, scored), (request.models.get("reward_model"), scored)],
        work=request.passes(row=group, rows=groups),
        use=HeadUse(together=config.couples_tokens, entropy=config.has_entropy_bonus),
    )


STAGE = Stage(
    name="rl",
    version=9,
    config=Config,
    inputs={
        "model": Input(MODELS),
        "dataset": Input(("dataset",), types=PROMPT_TYPES, required=False),
        "eval_dataset": Input(("dataset",), types=PROMPT_TYPES, required=False),
        "rollouts": Input(("dataset",), required=False),
        "reward_model": Input(("reward_model",), required=False),
        "reference": Input(MODELS, required=False),
    },
    outputs={"model": "model", "adapter": "adapter", "rollouts": "dataset"},
    active_outputs=lambda config: policy_outputs(config, "rollouts"),
    dataset_types=lambda config, inputs: {"rollouts": "prompt_completion"},
    run=run,
    summary="GRPO, RLOO and relatives with the embedded sampler",
    check=check,
    main_metric="reward",
    memory=memory,
    shapes=same_shape,
    tokenized=tokenized,
)
