"""Sampling: completions of a model with their scores, the best as SFT rows, right against wrong as pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from artifacts.errors import StageError
from stages.data.open_prompts import open_prompts
from stages.data.types import PROMPT_TYPES
from stages.evaluation.config import AnswerConfig, answer_problems
from stages.evaluation.memory import answering_phases
from stages.stage import MODELS, Input, Stage
from stages.training.memory_phase import Phase
from stages.training.memory_request import Request

if TYPE_CHECKING:
    from stages.context import Context
    from stages.evaluation.answers import Answer
    from stages.evaluation.rows import TaskLedger
    from stages.evaluation.tables import Table

OutputName = Literal["completions", "best", "pairs"]


class Config(AnswerConfig):
    """Settings of sampling."""

    num_generations: int = Field(4, gt=0)
    """Completions of one prompt."""
    reward_weights: tuple[float, ...] | None = None
    """One weight a reward, the reward model's last; null: all 1."""
    threshold: float | None = 1.0
    """A completion is right when the weighted sum of its rewards is at least this; null: none is right or wrong, only
    better or worse than another."""
    outputs: tuple[OutputName, ...] = ("completions", "best", "pairs")
    """The datasets to write."""
    keep: Literal["best", "all_right"] = "best"
    """Rows of `best`: the right completion with the highest reward, or every right one."""
    pairs_per_prompt: int = Field(1, gt=0)
    """Most pairs of one prompt; no completion is in two of them."""
    min_gap: float = Field(0.0, ge=0)
    """The chosen completion's reward is higher than the rejected one's by at least this."""


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration and the inputs together."""
    count = len(config.rewards) + ("reward_model" in wired)
    problems = answer_problems(config, count)
    if not config.outputs:
        problems.append("outputs is empty: name completions, best or pairs")
    for name in config.outputs:
        if name != "completions" and not count:
            problems.append(f"output {name} needs rewards: [...] or input reward_model")
    if "pairs" in config.outputs and config.num_generations < 2:
        problems.append("output pairs needs num_generations of 2 or more: a pair is two completions of one prompt")
    return problems


def active_outputs(config: Config) -> tuple[str, ...]:
    """The outputs that are written, in the order of declaration."""
    return tuple(name for name in STAGE.outputs if name in config.outputs)


def run(context: Context) -> None:
    """Let input `model` answer the prompts of input `dataset`; score and sort what it says."""
    from stages.data.dataset import read_dataset
    from stages.evaluation.answers import answer_prompts, reward_model_of
    from stages.evaluation.rows import TaskLedger, draw_rows
    from stages.evaluation.tables import TABLES, Answered
    from stages.rollouts.rewards import RewardSet
    from stages.training.processes import prepare_process
    from stages.training.reporting import peak_memory_gb
    from stages.training.start import frozen_scorer, tokenizer_of

    config: Config = context.config
    accelerator = prepare_process(context)
    dataset, left_out = draw_rows(read_dataset(context.input("dataset")), config.limit, config.seed)
    context.phase("loading the model")
    scorer = frozen_scorer(context, "model", bf16=config.bf16).to(accelerator.device)
    tokenizer = tokenizer_of(context, "model")
    judge = reward_model_of(context, accelerator, tokenizer)
    scorings = {}
    if config.rewards or judge is not None:
        scorings["reward"] = RewardSet(
            config.rewards,
            config.reward_weights,
            reward_model=judge,
            open_shards=context.store.shards,
            say=context.log,
        )
    ledger = TaskLedger()
    prompts = open_prompts(config, dataset, tokenizer, scorer.context_length, ledger)
    answers = answer_prompts(context, accelerator, scorer, tokenizer, prompts, scorings)
    _measure(context, answers)
    answered = Answered(dataset, prompts, answers)
    tables = {name: TABLES[name](answered, config) for name in active_outputs(config)}
    _publish(context, tables, dataset.conversational, ledger, left_out)
    context.timings["peak_memory_gb"] = peak_memory_gb()


def _measure(context: Context, answers: list[list[Answer]]) -> None:
    """Share of right completions, of prompts with one, mean reward and lengths."""
    from statistics import fmean

    from stages.evaluation.choosing import is_right, reward

    every = [answer for group in answers for answer in group]
    rewards = [value for answer in every if (value := reward(answer)) is not None]
    threshold = context.config.threshold
    if rewards and threshold is not None:
        context.metrics["accuracy"] = fmean(value >= threshold for value in rewards)
        solved = [any(is_right(answer, threshold) for answer in group) for group in answers]
        context.metrics["accuracy/any"] = fmean(solved)
    if rewards:
        context.metrics["reward"] = fmean(rewards)
    context.metrics["completions/mean_length"] = fmean(answer.tokens for answer in every)
    context.metrics["completions/clipped_ratio"] = fmean(not answer.finished for answer in every)
    context.counts |= {"prompts": len(answers), "completions": len(every)}


def _publish(
    context: Context, tables: dict[str, Table], conversational: bool, prompts: TaskLedger, left_out: list[str]
) -> None:
    """Write every table as a dataset. Raises StageError, before anything is written, when one is empty."""
    from stages.data.dataset import write_dataset
    from stages.data.ledger import say_dropped
    from stages.evaluation.rows import outcome_ledger

    ledgers = {name: outcome_ledger(prompts, table.reasons, left_out) for name, table in tables.items()}
    for name, table in tables.items():
        if not table.rows:
            raise StageError(
                f"output {name} has no row (prompts: {ledgers[name].summary()}): {_REMEDIES[name]}, or leave {name} "
                "out of outputs"
            )
        context.counts[f"{name}_rows"] = len(table.rows)
    if not context.is_main:
        return
    for name, table in tables.items():
        say_dropped(context, ledgers[name].states, output=name)
        write_dataset(
            context.output(name),
            table.rows,
            type=table.type,
            conversational=conversational,
            ledger=ledgers[name],
            # no fingerprint: equal rows are an equal artifact, and leave what is made of them cached
            source={"stage": "sample"},
        )


_REMEDIES = {
    "completions": "give prompts",
    "best": "lower threshold, raise num_generations, or train the model first",
    "pairs": "raise num_generations or temperature, change threshold, or lower min_gap",
}


def memory(request: Request) -> list[Phase]:
    """Sampling, and the passes of the reward model."""
    return answering_phases(request)


STAGE = Stage(
    name="sample",
    version=2,
    config=Config,
    inputs={
        "model": Input(MODELS),
        "dataset": Input(("dataset",), types=PROMPT_TYPES),
        "reward_model": Input(("reward_model",), required=False),
    },
    outputs={"completions": "dataset", "best": "dataset", "pairs": "dataset"},
    dataset_types=lambda config, inputs: {
        "completions": "prompt_completion",
        "best": "prompt_completion",
        "pairs": "preference",
    },
    run=run,
    summary="completions of a model with their scores, as rows, best rows and preference pairs",
    active_outputs=active_outputs,
    check=check,
    main_metric="accuracy",
    memory=memory,
    tokenized=open_prompts,
)
