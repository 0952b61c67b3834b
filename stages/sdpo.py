"""SDPO: a policy learns, token by token, what it would have written had it seen a success of its own, or feedback."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from stages.data.open_prompts import open_prompts
from stages.data.types import PROMPT_TYPES
from stages.rollouts.engine_problems import engine_problems
from stages.rollouts.engine_settings import EngineChoice
from stages.stage import MODELS, Input, Stage
from stages.training.advantage_settings import AdvantageConfig, advantage_problems
from stages.training.config import PolicyConfig, policy_outputs
from stages.training.eval_settings import held_out_problems
from stages.training.memory import same_shape
from stages.training.memory_self_teaching import self_taught_phases
from stages.training.policy_settings import PolicyLossConfig, policy_problems
from stages.training.rollout_settings import GroupedRolloutConfig, dropout_problems, reward_problems, sampler_tolerance
from stages.training.self_teaching_settings import SelfTeachingConfig, self_teaching_problems

if TYPE_CHECKING:
    from stages.context import Context
    from stages.training.batch import Group
    from stages.training.loop import Trainer
    from stages.training.policy import PolicyLoss
    from stages.training.rollout_windows import Learning
    from stages.training.self_distillation import SelfTeaching
    from stages.training.self_teacher import SelfTeacher


class Config(EngineChoice, SelfTeachingConfig, PolicyLossConfig, AdvantageConfig, GroupedRolloutConfig, PolicyConfig):
    """Settings of SDPO, under TRL's names. An item of train_batch_size is a completion."""

    max_length: int = Field(1024, gt=1)
    """Longest prompt in tokens; longer ones are dropped and counted in the ledger. The teacher's: max_reprompt_len."""


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration and the inputs together."""
    problems = reward_problems(config.rewards, config.reward_weights, wired) + engine_problems(config, config)
    problems += self_teaching_problems(config)
    if config.train_batch_size % config.num_generations:
        problems.append(
            f"train_batch_size {config.train_batch_size} is no multiple of num_generations {config.num_generations}"
        )
    problems += policy_problems(config, ever_off_policy=_is_reused(config) or sampler_tolerance(config) is None)
    problems += advantage_problems(config, kl_in_reward=config.penalizes_reward)
    problems += dropout_problems(config) + held_out_problems(config, wired)
    if "reference" in wired and not config.beta:
        problems.append("input reference is wired in, but beta is 0, so it would not be used")
    return problems


def run(context: Context) -> None:
    """Train input `model` on the prompts of input `dataset`, rewarded by functions and input `reward_model`, and taught
    by itself where a completion of the group succeeded or there is feedback."""
    from stages.data.dataset import read_dataset
    from stages.data.ledger import RowLedger
    from stages.training.generation import Generation
    from stages.training.lessons import taught
    from stages.training.online_run import read_prompts, train_on_rollouts
    from stages.training.rollout_drawing import Drawing, Generate
    from stages.training.rollout_plan import grouped_plan
    from stages.training.rollout_windows import RolloutWindows
    from stages.training.self_teacher import SelfTeacher
    from stages.training.start import start

    config: Config = context.config
    teacher = SelfTeacher(config.temperature) if config.distillation_weight else None
    objective = _objective(config, teacher)
    trainer, tokenizer = start(context, config, objective)
    learning = _learning(context, trainer, objective)
    ledger = RowLedger()
    prompts = read_prompts(context, trainer, tokenizer, ledger)
    generation = Generation.of(context, trainer, tokenizer, config)
    generate: Generate = generation
    if teacher is not None:
        teacher.join(trainer, config)
        dataset = read_dataset(context.input("dataset"))
        longest = trainer.scorer.context_length
        generate = taught(context, generation, dataset, prompts, longest, config.mask_truncated_completions)
    plan = grouped_plan(config, trained=config.num_generations)
    rollouts = RolloutWindows(context, Drawing(prompts, plan, generate), plan, learning)
    windows = rollouts if teacher is None else teacher.followed(trainer, rollouts, config)
    train_on_rollouts(context, trainer, tokenizer, windows, rollouts, ledger)


def _objective(config: Config, teacher: SelfTeacher | None) -> PolicyLoss:
    """`rl`'s, and the distillation beside it or in its place."""
    from stages.training.policy import PolicyLoss
    from stages.training.self_distillation import SelfDistillationLoss

    settings = config.policy_settings(
        temperature=config.temperature, longest=config.max_completion_length, tolerance=sampler_tolerance(config)
    )
    if teacher is None:
        return PolicyLoss(settings, config.entropy_bonus())
    return SelfDistillationLoss(settings, _teaching(config), teacher, config.entropy_bonus())


def _teaching(config: Config) -> SelfTeaching:
    from stages.losses.distillation import divergence_of
    from stages.losses.self_distillation import OwnTop
    from stages.training.self_distillation import SelfTeaching

    whole = config.distillation_mode != "sampled_token"
    return SelfTeaching(
        weight=config.distillation_weight,
        divergence=divergence_of(config.distillation_alpha) if whole else None,
        top=None
        if config.distillation_topk is None
        else OwnTop(config.distillation_topk, config.distillation_add_tail),
        importance_clip=config.distillation_is_clip,
    )


def _learning(context: Context, trainer: Trainer, objective: PolicyLoss) -> Learning:
    """How completions become something to learn from: as in `rl`, and by what taught them."""
    from stages.training.advantages import RewardPenalty, advantages_of, penalized
    from stages.training.initial import reference_of
    from stages.training.measuring import every_branch, measure_groups, no_branch, only_where
    from stages.training.policy_step import step_of
    from stages.training.rollout_windows import Learning, has_advantages
    from stages.training.taught_rollouts import TaughtRollouts, is_taught, taught_branches, taught_step, with_lessons

    config: Config = context.config
    reference = reference_of(context, trainer) if config.beta else None
    skippable = not config.penalizes_loss and not config.has_entropy_bonus and trainer.balance is None
    weight = config.distillation_weight
    # the balance of a mixture of experts is that of all completions
    cut = weight == 1 and trainer.balance is None

    def teaches(group: Group) -> bool:
        return (weight > 0 and is_taught(group)) or (weight < 1 and has_advantages(group))

    taught = no_branch if config.distillation_is_clip is None else taught_branches
    # a penalty makes advantages of what is measured
    every = config.penalizes_reward or not skippable
    compared = every_branch if every else only_where(teaches, taught if cut else every_branch)
    old = _is_reused(config) or config.penalizes_reward
    measure = measure_groups(trainer, reference, config, old=old, compared=compared)
    advantages = advantages_of(config)
    if config.penalizes_reward:
        advantages, measure = penalized(config, RewardPenalty.of(config.beta, config.kl_estimator), measure)
    of_step = step_of(trainer, objective, config)
    learning = Learning(
        advantages=advantages,
        measure=measure,
        count=objective.count,
        skippable=skippable,
        of_step=of_step,
        teaches=teaches,
    )
    if not weight:
        return learning
    learning = replace(learning, data=TaughtRollouts, informed=with_lessons)
    return replace(learning, of_step=taught_step(of_step, objective.count, alone=cut, is_idle=learning.is_idle))


def _is_reused(config: Config) -> bool:
    """Whether completions are trained on after their first step."""
    return config.steps_per_generation * config.num_iterations > 1


STAGE = Stage(
    name="sdpo",
    version=3,
    config=Config,
    inputs={
        "model": Input(MODELS),
        "dataset": Input(("dataset",), types=PROMPT_TYPES),
        "eval_dataset": Input(("dataset",), types=PROMPT_TYPES, required=False),
        "reward_model": Input(("reward_model",), required=False),
        "reference": Input(MODELS, required=False),
    },
    outputs={"model": "model", "adapter": "adapter", "rollouts": "dataset"},
    active_outputs=lambda config: policy_outputs(config, "rollouts"),
    dataset_types=lambda config, inputs: {"rollouts": "prompt_completion"},
    run=run,
    summary="SDPO: a policy that learns from itself under prompts with its own successes, or with feedback",
    check=check,
    main_metric="reward",
    memory=self_taught_phases,
    shapes=same_shape,
    tokenized=open_prompts,
)
