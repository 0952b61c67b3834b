"""The datasets that `sample` makes of answers: all of them, the best, and pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.data.tokenize import TokenizedPrompt
from stages.data.types import ROW_ID, Dataset, Row
from stages.evaluation.answers import Answer
from stages.evaluation.choosing import best_answers, choose_pairs, reward, why_no_best, why_no_pair
from stages.evaluation.rows import extra_columns


@dataclass(frozen=True)
class Table:
    """Rows of a dataset, and why prompts (by row id) gave none."""

    type: str
    rows: list[Row] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """Prompts with their answers, and what the dataset holds beside them."""

    dataset: Dataset
    prompts: Sequence[TokenizedPrompt]
    answers: Sequence[Sequence[Answer]]

    def row(self, prompt: TokenizedPrompt, name: str, **columns: Any) -> Row:
        """A row derived from a prompt: `<its row id>/<name>`. New columns replace equally named ones."""
        extras = extra_columns(self.dataset, prompt.row)
        derived = {ROW_ID: f"{prompt.row_id}/{name}", "prompt": prompt.row["prompt"], "prompt_row_id": prompt.row_id}
        return extras | derived | columns

    def spoken(self, answer: Answer) -> Any:
        """The completion as the dataset writes completions: text, or an assistant's turn."""
        return [{"role": "assistant", "content": answer.text}] if self.dataset.conversational else answer.text

    def answer_row(self, prompt: TokenizedPrompt, answer: Answer) -> Row:
        """One completion with all its scores."""
        scores = {f"reward_{name}": value for name, value in answer.rewards.items()}
        return self.row(
            prompt,
            str(answer.sample),
            completion=self.spoken(answer),
            sample=answer.sample,
            finished=answer.finished,
            completion_tokens=answer.tokens,
            **({"reward": reward(answer)} if answer.totals else {}),
            **scores,
        )


def completions_table(answered: Answered, config: Any) -> Table:
    """Every completion."""
    table = Table("prompt_completion")
    for prompt, answers in zip(answered.prompts, answered.answers, strict=True):
        table.rows.extend(answered.answer_row(prompt, answer) for answer in answers)
    return table


def best_table(answered: Answered, config: Any) -> Table:
    """The right completions of every prompt, or the best of them."""
    table = Table("prompt_completion")
    for prompt, answers in zip(answered.prompts, answered.answers, strict=True):
        best = best_answers(answers, config.threshold, keep_all=config.keep == "all_right")
        table.rows.extend(answered.answer_row(prompt, answer) for answer in best)
        if not best:
            table.reasons[prompt.row_id] = why_no_best(answers)
    return table


def pairs_table(answered: Answered, config: Any) -> Table:
    """A right completion against a wrong one."""
    table = Table("preference")
    for prompt, answers in zip(answered.prompts, answered.answers, strict=True):
        pairs = choose_pairs(
            answers, config.threshold, min_gap=config.min_gap, count=config.pairs_per_prompt, seed=config.seed
        )
        for chosen, rejected in pairs:
            row = answered.row(
                prompt,
                f"{chosen.sample}-{rejected.sample}",
                chosen=answered.spoken(chosen),
                rejected=answered.spoken(rejected),
                chosen_score=reward(chosen),
                rejected_score=reward(rejected),
            )
            table.rows.append(row)
        if not pairs:
            table.reasons[prompt.row_id] = why_no_pair(answers, config.threshold)
    return table


TABLES: dict[str, Callable[[Answered, Any], Table]] = {
    "completions": completions_table,
    "best": best_table,
    "pairs": pairs_table,
}
"""By output of the stage."""
