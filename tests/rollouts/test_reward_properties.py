"""What holds of every built-in reward that asks nobody, on any completion."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from stages.rollouts.reward_arguments import Call, Place
from stages.rollouts.reward_spec import REWARDS
from stages.rollouts.rewards import RewardSet
from tests.rollouts.scored import spec

PARAMETERS: dict[str, dict[str, Any]] = {
    "exact_match": {},
    "numeric_match": {},
    "math": {},
    "multiple_choice": {},
    "think_format": {},
    "regular_expression": {"pattern": "a|b+", "match": "anywhere"},
    "json_schema": {"expected": {"type": "integer"}, "fenced": True},
    "cosine_length": {"max_len": 5, "correct": "numeric_match"},
    "soft_overlong": {"max_completion_len": 4, "soft_punish_cache": 3},
    "repetition_penalty": {"ngram_size": 2},
}
RANGES = {"cosine_length": (-1.0, 1.0), "soft_overlong": (-1.0, 0.0), "repetition_penalty": (-1.0, 0.0)}
WORDS = some.sampled_from(
    [
        "<think>",
        "</think>",
        "```",
        "\n",
        "B",
        "answer is ",
        "\\boxed{",
        "}",
        "1",
        "/",
        "0",
        "-",
        ",",
        "$",
        "{",
        "[",
        "é",
    ]
)
ELSEWHERE = ("code", "environment")
"""Those that judge what a completion does, not its text; they have tests of their own."""
TEXTS = some.one_of(some.text(max_size=12), some.lists(WORDS, max_size=8).map("".join))
ROWS = some.lists(some.tuples(TEXTS, some.one_of(some.none(), TEXTS, some.integers(-3, 99))), min_size=1, max_size=4)


def arguments(rows: list[tuple[str, Any]], conversational: bool) -> dict[str, list[Any]]:
    texts = [text for text, _ in rows]
    return {
        "prompts": ["q"] * len(rows),
        "completions": [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts,
        "completion_ids": [[ord(letter) % 3 for letter in text] for text in texts],
        "answer": [answer for _, answer in rows],
        "row_id": [f"r{index}" for index in range(len(rows))],
    }


def test_they_are_all_here() -> None:
    assert set(PARAMETERS) >= {name for name, kind in REWARDS.items() if not kind.cached and name not in ELSEWHERE}


@pytest.mark.parametrize("name", PARAMETERS)
def test_pure_within_range_and_of_each_completion_alone(name: str) -> None:
    (function,) = RewardSet([spec(name, parameters=PARAMETERS[name])])._functions

    def rewards(rows: list[tuple[str, Any]], conversational: bool = False) -> list[float | None]:
        given_arguments = arguments(rows, conversational)
        before = copy.deepcopy(given_arguments)
        call = Call([Place("r", 0)] * len(rows), given_arguments)
        found: list[float | None] = function.start(call)
        assert given_arguments == before
        return found

    low, high = RANGES.get(name, (0.0, 1.0))

    @settings(max_examples=15 if name == "math" else 60)
    @given(ROWS)
    def check(rows: list[tuple[str, Any]]) -> None:
        found = rewards(rows)
        assert len(found) == len(rows)
        assert all(value is None or (math.isfinite(value) and low <= value <= high) for value in found)
        assert found == rewards(rows) == rewards(rows, conversational=True)
        assert found == [value for row in rows for value in rewards([row])]

    check()
