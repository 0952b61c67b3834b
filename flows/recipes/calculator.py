"""A calculator as two tools, and problems that take both: a product, then a sum.

The demonstrations are not clean: at each step, one in four guesses instead of calling a tool. A model that is only
trained on them guesses as often; what trains on the checker's word learns to call.
"""

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

SLIPS = 0.25
"""Chance of a guess where a tool should be called."""


def multiply(a: int, b: int) -> int:
    """The product of two numbers.

    Args:
        a: One number.
        b: The other.
    """
    return a * b


def add(a: int, b: int) -> int:
    """The sum of two numbers.

    Args:
        a: One number.
        b: The other.
    """
    return a + b


def problems() -> Iterator[dict[str, Any]]:
    """a*b+c with three numbers from 4 to 9, each problem a dozen times, with a demonstration in turns."""
    tools = [{"type": "function", "function": {"name": name}} for name in ("multiply", "add")]
    for number, (a, b, c) in enumerate(product(range(4, 10), repeat=3)):
        for time in range(12):
            yield {
                "prompt": [{"role": "user", "content": f"{a}*{b}+{c}"}],
                "completion": demonstration(a, b, c, random.Random(f"{number} {time}")),
                "answer": str(a * b + c),
                "tools": tools,  # what the model is told of in demonstrations and rollouts alike
            }


def demonstration(a: int, b: int, c: int, chance: random.Random) -> list[dict[str, Any]]:
    """The turns of a solution, or of one that guesses."""
    turns: list[dict[str, Any]] = []
    known = [a, b]
    for tool, function, other in (("multiply", multiply, b), ("add", add, c)):
        if chance.random() < SLIPS:
            return [*turns, {"role": "assistant", "content": str(chance.randint(10, 99))}]
        known = [known[0], other]
        call = {"type": "function", "function": {"name": tool, "arguments": {"a": known[0], "b": known[1]}}}
        known = [function(*known)]
        turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
        turns.append({"role": "tool", "name": tool, "content": str(known[0])})
    return [*turns, {"role": "assistant", "content": str(known[0])}]


def correct(completions: list[list[dict[str, Any]]], answer: list[str], **_: Any) -> list[float]:
    """1.0 where the last turn is the right number, 0.0 for anything else."""
    return [
        float(turns[-1]["content"].strip() == expected) for turns, expected in zip(completions, answer, strict=True)
    ]
