"""The quickstart's task: sums and differences of two-digit numbers, and whether an answer is right.

The demonstrations are not clean: one in four is ten too high. Supervised training learns the slips with the rest;
what trains on the checker's word gets over them.

Your own task looks the same: a function that yields rows, and one that scores completions. A recipe names them as
`arithmetic.py:problems` and `arithmetic.py:correct`; their source counts for caching, so editing this file reruns
what depends on it.
"""

import random
from collections.abc import Iterator
from typing import Any

SLIPS = 0.25
"""Share of the demonstrations that are wrong."""


def problems() -> Iterator[dict[str, Any]]:
    """Every sum of two numbers from 10 to 99, and every difference that is not negative."""
    for left in range(10, 100):
        for right in range(10, 100):
            yield row(f"{left}+{right}", left + right)
            if left >= right:
                yield row(f"{left}-{right}", left - right)


def row(question: str, answer: int) -> dict[str, Any]:
    """A conversation of one question and its demonstration; `answer`, the right one, is kept for the checker."""
    slipped = random.Random(question).random() < SLIPS
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": str(answer + 10 if slipped else answer)}],
        "answer": str(answer),
    }


def correct(
    prompts: list[list[dict[str, str]]], completions: list[list[dict[str, str]]], answer: list[str], **_: Any
) -> list[float]:
    """1.0 for the right number, 0.0 for anything else."""
    return [
        float(completion[0]["content"].strip() == expected)
        for completion, expected in zip(completions, answer, strict=True)
    ]
