"""Completions of several turns in training: what a stage's configuration makes of them, and what of them counts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from stages.data.tokenize import TokenizedPrompt
from stages.data.types import Row
from stages.rollouts.multi_turn.loop import MultiTurn
from stages.rollouts.requests import Completion


def multi_turn_of(
    accelerator: Accelerator, tokenizer: Any, config: Any, end_token_ids: Collection[int]
) -> MultiTurn | None:
    """As a stage's configuration (a `MultiTurnConfig`) says; None: a completion is one turn."""
    if not config.tools and config.environment is None:
        return None
    return MultiTurn(tokenizer, config, end_token_ids, anyone=_anyone(accelerator))


def with_tools(multi_turn: MultiTurn | None) -> Callable[[Row], Row]:
    """What gives a row the schemas of its tools."""
    tools = None if multi_turn is None else multi_turn.tools
    return (lambda row: row) if tools is None else tools.checked


def _anyone(accelerator: Accelerator) -> Callable[[bool], bool]:
    """Whether it holds in any process."""
    if accelerator.num_processes == 1:
        return lambda held: held
    return lambda held: any(gather_object([held]))


def opened(prompt: TokenizedPrompt, completions: Sequence[Completion]) -> TokenizedPrompt:
    """The prompt with what the environment showed at first."""
    openings = [one.episode.opening for one in completions if one.episode is not None]
    opening = openings[0] if openings else None
    if opening is None:
        return prompt
    return replace(prompt, prompt_ids=opening.prompt_ids, row={**prompt.row, "prompt": opening.messages})


def unless_broken(totals: Sequence[float | None], completions: Sequence[Completion]) -> list[float | None]:
    """The rewards, None where the environment broke: whatever else scored the completion, it is not compared."""
    return [
        None if one.episode is not None and one.episode.error is not None else total
        for total, one in zip(totals, completions, strict=True)
    ]
