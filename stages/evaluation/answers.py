"""A model's answers to prompts, and what rewards say of them; shard by shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator

from stages.context import Context
from stages.data.tokenize import TokenizedPrompt
from stages.evaluation.config import AnswerConfig
from stages.rollouts.form_masks import check_form
from stages.rollouts.requests import Completion
from stages.rollouts.rewards import RewardSet, Scores, failed_metric
from stages.seeds import derive
from stages.shards import in_shards
from stages.training.frozen_engine import frozen_engine_of
from stages.training.generation import Sampling, end_token_ids, sampling_settings
from stages.training.model import Scorer
from stages.training.processes import Processes
from stages.training.reward_scoring import RewardModelScorer

_SHARD_COMPLETIONS = 256
"""Completions of one shard: what a killed run samples again at most."""


@dataclass(frozen=True)
class Answer:
    """One completion and its scores."""

    row_id: str
    """Of the prompt."""
    sample: int
    """Which completion of the prompt, from 0."""
    text: str
    tokens: int
    finished: bool
    totals: dict[str, float | None]
    """By scoring: the weighted reward; None where no function scored the completion."""
    rewards: dict[str, float | None]
    """By reward function."""
    failed: list[str] = field(default_factory=list)
    """Reward functions that may fail (`on_error: none`), and did."""


def reward_model_of(context: Context, accelerator: Accelerator, tokenizer: Any) -> RewardModelScorer | None:
    """Input `reward_model`, where it is wired in."""
    if not context.has("reward_model"):
        return None
    config = context.config
    return RewardModelScorer(context, tokenizer, accelerator.device, config.micro_batch_tokens, bf16=config.bf16)


def answer_prompts(
    context: Context,
    accelerator: Accelerator,
    scorer: Scorer,
    tokenizer: Any,
    prompts: Sequence[TokenizedPrompt],
    scorings: Mapping[str, RewardSet],
) -> list[list[Answer]]:
    """num_generations answers a prompt, each scored by every one of `scorings`. Failures of functions that may fail
    become metrics."""
    config: AnswerConfig = context.config
    ends = end_token_ids(scorer.transformers_model, tokenizer)
    check_form(config.structured, tokenizer, ends, context.log)
    engine = frozen_engine_of(context, Processes.of(accelerator), scorer, ends)
    sampling = Sampling(scorer, tokenizer, sampling_settings(config), accelerator=None, engine=engine)

    def compute(part: Sequence[TokenizedPrompt]) -> list[dict[str, Any]]:
        seeds = [
            tuple(derive(config.seed, "sample", prompt.row_id, index) for index in range(config.num_generations))
            for prompt in part
        ]
        sampled = sampling(part, seeds)
        if not part:  # only so that others go on that share the engine
            return []
        context.tokens += sum(len(prompt.prompt_ids) for prompt in part)
        context.tokens += sum(len(completion.token_ids) for group in sampled for completion in group)
        texts = [[sampling.text(completion) for completion in group] for group in sampled]
        scored = {name: rewards.score(part, sampled, texts, some_scored=False) for name, rewards in scorings.items()}
        return [{"answers": _answers(part, row, sampled[row], texts[row], scored)} for row in range(len(part))]

    size = max(1, _SHARD_COMPLETIONS // config.num_generations)
    context.phase("answering prompts")
    shared = config.rollouts.processes_per_engine > 1
    rows = in_shards(context, accelerator, "answers", prompts, compute, size=size, equally_often=shared)
    answers = [[Answer(**answer) for answer in row["answers"]] for row in rows]
    for name in (name for rewards in scorings.values() for name in rewards.may_fail):
        context.metrics[failed_metric(name)] = float(sum(name in one.failed for group in answers for one in group))
    return answers


def _answers(
    part: Sequence[TokenizedPrompt],
    row: int,
    completions: Sequence[Completion],
    texts: Sequence[str],
    scored: Mapping[str, Scores],
) -> list[dict[str, Any]]:
    """The fields of an `Answer` for every completion of one prompt of a shard."""
    by_function = {name: values[row] for found in scored.values() for name, values in found.by_function.items()}
    failed = {name: values[row] for found in scored.values() for name, values in found.failed.items()}
    return [
        {
            "row_id": part[row].row_id,
            "sample": index,
            "text": texts[index],
            "tokens": len(completion.token_ids),
            "finished": completion.finished,
            "totals": {name: found.totals[row][index] for name, found in scored.items()},
            "rewards": {name: values[index] for name, values in by_function.items()},
            "failed": [name for name, values in failed.items() if values[index]],
        }
        for index, completion in enumerate(completions)
    ]
