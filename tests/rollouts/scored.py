"""Prompts and completions for rewards, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.rollouts.requests import Completion
from stages.rollouts.reward_spec import RewardSpec
from stages.rollouts.rewards import RewardSet, Scores


@dataclass
class Prompt:
    """What rewards see of a `TokenizedPrompt`."""

    row_id: str
    row: dict[str, Any]
    prompt_ids: list[int] = field(default_factory=lambda: [1, 2])


def prompts(*answers: Any, column: str = "answer") -> list[Any]:
    """Rows row0, row1, ... with these answers."""
    return [
        Prompt(f"row{number}", {"row_id": f"row{number}", "prompt": f"question {number}", column: answer})
        for number, answer in enumerate(answers)
    ]


def score(rewards: RewardSet, rows: Sequence[Any], texts: Sequence[Sequence[str]]) -> Scores:
    """The rewards of texts, whose token is their first letter."""
    completions = [[Completion([ord(text[0])] if text else [], [], True) for text in group] for group in texts]
    return rewards.score(rows, completions, texts)


def spec(name: str, **fields: Any) -> RewardSpec:
    """As a recipe gives it."""
    return RewardSpec.model_validate({"name": name, **fields})
