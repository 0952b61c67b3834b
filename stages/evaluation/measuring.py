"""The measurements of `evaluate`: each gives estimates, and what is known of every row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate import Accelerator

from artifacts.errors import StageError
from stages.context import Context
from stages.data.ledger import RowLedger
from stages.data.open_prompts import open_prompts
from stages.data.pairs import tokenize_pairs
from stages.data.truncation import RowLimit
from stages.data.types import Dataset
from stages.evaluation.answer_metrics import pass_rates, reward_means
from stages.evaluation.answers import Answer, answer_prompts, reward_model_of
from stages.evaluation.intervals import Estimate, mean_estimate, ratio_estimate, share_estimate
from stages.evaluation.seen import loss_rows
from stages.evaluation.text import pair_logprobs, pair_rewards, sequence_losses
from stages.rollouts.rewards import REWARD_MODEL, RewardSet
from stages.training.batch import Group
from stages.training.model import Scorer
from stages.training.pairs import Reference, pair_group
from stages.training.reference import read_references
from stages.training.start import frozen_scorer

_LARGEST_EXPONENT = 700.0
"""exp of more is no float."""


@dataclass(frozen=True)
class Subject:
    """The model under test and its rows."""

    context: Context
    accelerator: Accelerator
    scorer: Scorer
    tokenizer: Any
    dataset: Dataset
    is_reward_model: bool

    @property
    def max_length(self) -> int:
        """Longest row in tokens."""
        return RowLimit.of(self.context.config.max_length, self.scorer.context_length)


@dataclass(frozen=True)
class Measured:
    """Estimates by name, and by row id the records of the row (several where it was answered several times)."""

    estimates: dict[str, Estimate]
    records: dict[str, list[dict[str, Any]]]


def measure_loss(subject: Subject, tasks: Sequence[str], ledger: RowLedger) -> Measured:
    """`loss`: mean negative log-probability of a trained token, and `perplexity`, its exponential."""
    config = subject.context.config
    rows = loss_rows(config, subject.dataset, subject.tokenizer, subject.max_length, ledger)
    subject.context.phase("loss of the rows")
    losses = sequence_losses(subject.context, subject.accelerator, subject.scorer, rows)
    loss = ratio_estimate([total for total, _ in losses], [tokens for _, tokens in losses], config.seed)
    estimates = {"loss": loss}
    if loss.high < _LARGEST_EXPONENT:
        estimates["perplexity"] = loss.map(math.exp)
    records = {
        row.row_id: [{"loss": total / tokens, "loss_tokens": tokens}]
        for row, (total, tokens) in zip(rows, losses, strict=True)
    }
    return Measured(estimates, records)


def measure_pairs(subject: Subject, tasks: Sequence[str], ledger: RowLedger) -> Measured:
    """`preference/accuracy`: share of pairs whose chosen completion scores strictly higher; `preference/margin`: by
    how much, on average.

    What a score is shows in the means beside them: `rewards/chosen` (a reward model's, or the implicit reward
    beta (log p - log p_reference)) or, without a reference, `logps/chosen` (the summed log-probability).
    """
    context = subject.context
    pairs = tokenize_pairs(subject.dataset, subject.tokenizer, max_length=subject.max_length, ledger=ledger)
    groups = [pair_group(pair) for pair in pairs]
    context.phase("scores of the pairs")
    name, scores = _pair_scores(subject, groups)
    seed, margins = context.config.seed, [chosen - rejected for chosen, rejected in scores]
    estimates = {
        "preference/accuracy": share_estimate([float(margin > 0) for margin in margins], [1.0] * len(margins)),
        "preference/margin": mean_estimate(margins, seed),
        f"{name}/chosen": mean_estimate([chosen for chosen, _ in scores], seed),
        f"{name}/rejected": mean_estimate([rejected for _, rejected in scores], seed),
    }
    records = {
        pair.row_id: [{"correct": margin > 0, "chosen_score": chosen, "rejected_score": rejected}]
        for pair, margin, (chosen, rejected) in zip(pairs, margins, scores, strict=True)
    }
    return Measured(estimates, records)


def _pair_scores(subject: Subject, groups: Sequence[Group]) -> tuple[str, list[tuple[float, float]]]:
    """(what the scores are, (chosen, rejected) of every pair)."""
    context, accelerator = subject.context, subject.accelerator
    if subject.is_reward_model:
        return "rewards", [(a, b) for a, b in pair_rewards(context, accelerator, subject.scorer, groups)]
    logps = pair_logprobs(context, accelerator, subject.scorer, groups, "pairs")
    references = _references(subject, groups)
    if references is None:
        return "logps", [(chosen, rejected) for chosen, rejected in logps]
    beta = context.config.beta
    return "rewards", [
        (beta * (chosen - reference.chosen), beta * (rejected - reference.rejected))
        for (chosen, rejected), reference in zip(logps, references, strict=True)
    ]


def _references(subject: Subject, groups: Sequence[Group]) -> list[Reference] | None:
    context, accelerator = subject.context, subject.accelerator
    if context.has("reference_logprobs"):
        return read_references(context, "reference_logprobs", groups)
    if not context.has("reference"):
        return None
    context.phase("log-probabilities of the reference")
    scorer = frozen_scorer(context, "reference", bf16=context.config.bf16).to(accelerator.device)
    logps = pair_logprobs(context, accelerator, scorer, groups, "reference-pairs")
    return [Reference(chosen, rejected) for chosen, rejected in logps]


def measure_answers(subject: Subject, tasks: Sequence[str], ledger: RowLedger) -> Measured:
    """`accuracy`: share of completions whose weighted reward is at least `threshold`, with `answer_metrics` beside it;
    `reward`: mean score of the reward model. Completions that no function scored (None) count in neither."""
    context = subject.context
    config = context.config
    prompts = open_prompts(config, subject.dataset, subject.tokenizer, subject.scorer.context_length, ledger)
    scorings = {}
    if "accuracy" in tasks:
        scorings["reward"] = RewardSet(
            config.rewards, config.reward_weights, open_shards=context.store.shards, say=context.log
        )
    if "reward" in tasks:
        judge = reward_model_of(context, subject.accelerator, subject.tokenizer)
        scorings["score"] = RewardSet((), None, reward_model=judge)
    answers = answer_prompts(context, subject.accelerator, subject.scorer, subject.tokenizer, prompts, scorings)
    context.counts["completions"] = sum(map(len, answers))
    records = {
        group[0].row_id: [_answer_record(answer, config.threshold, tasks) for answer in group] for group in answers
    }
    rows = list(records.values())
    mean = partial(ratio_estimate, seed=config.seed)
    estimates = {
        name: _over_answers(rows, field, estimate)
        for task, name, field, estimate in (
            ("accuracy", "accuracy", "correct", share_estimate),
            ("reward", "reward", "score", mean),
        )
        if task in tasks
    }
    if "accuracy" in tasks:
        functions = [name for name in answers[0][0].rewards if name != REWARD_MODEL]
        estimates |= {**pass_rates(rows, config.seed), **reward_means(rows, functions, config.seed)}
    estimates["completions/mean_length"] = _over_answers(rows, "tokens", mean)
    clipped = [[{"clipped": not record["finished"]} for record in row] for row in rows]
    estimates["completions/clipped_ratio"] = _over_answers(clipped, "clipped", share_estimate)
    return Measured(estimates, records)


def _answer_record(answer: Answer, threshold: float, tasks: Sequence[str]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "sample": answer.sample,
        "completion": answer.text,
        "tokens": answer.tokens,
        "finished": answer.finished,
    }
    if "accuracy" in tasks:
        reward = answer.totals["reward"]
        record |= {"correct": None if reward is None else reward >= threshold, "reward": reward}
        record |= {f"reward_{name}": value for name, value in answer.rewards.items() if name != REWARD_MODEL}
    if "reward" in tasks:
        record["score"] = answer.totals["score"]
    return record


def _over_answers(
    rows: Sequence[Sequence[dict[str, Any]]],
    field: str,
    estimate: Callable[[Sequence[float], Sequence[float]], Estimate],
) -> Estimate:
    """The mean of a field over all answers that have it; `estimate` gets its sum and number of every row."""
    values = [[float(record[field]) for record in row if record[field] is not None] for row in rows]
    if not any(values):
        raise StageError(
            f"no completion has a value of {field!r}: every reward function returned None for all of them; check that "
            "they find the columns they compare with"
        )
    return estimate([sum(row) for row in values], [float(len(row)) for row in values])
