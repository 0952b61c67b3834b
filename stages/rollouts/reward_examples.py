"""An example of each built-in reward: its parameters, a row with a completion, and what that is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_CODE = """\
```python
def double(x):
    return 2 * x
```"""


@dataclass(frozen=True)
class Example:
    """`columns`: of the row, besides its prompt. `completion_ids`: the completion's, where tokens are what counts.
    `reply`: what a server is taken to say of it. `why`: how the score comes about."""

    prompt: str
    completion: str
    score: float
    why: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    completion_ids: Sequence[int] | None = None
    reply: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What there is of it."""
        given = {"row": {"prompt": self.prompt, **self.columns}, "completion": self.completion}
        more = {"completion_ids": self.completion_ids, "reply": self.reply}
        told = {name: value for name, value in more.items() if value is not None}
        return {**given, **told, "score": self.score, "why": self.why}


EXAMPLES: dict[str, Example] = {
    "exact_match": Example("2+2=", " 4\n", 1.0, "white space around it does not count", {"answer": "4"}),
    "numeric_match": Example(
        "What is 6 times 7?", "7 sixes are 42.0", 1.0, "the final number has the value of 42", {"answer": "42"}
    ),
    "math": Example(
        "What is 3 divided by 6?",
        "It is $\\boxed{\\frac{1}{2}}$.",
        1.0,
        "the same number, written otherwise",
        {"answer": "$0.5$"},
    ),
    "multiple_choice": Example(
        "What is the capital of France? (A) Rome (B) Paris",
        "Rome is Italy's, so the answer is (B).",
        1.0,
        "the letter after `answer is`",
        {"answer": "B"},
    ),
    "think_format": Example("2+2=", "<think>Two and two.</think>4", 1.0, "one thought, then the answer"),
    "regular_expression": Example(
        "2+2=",
        "4.",
        0.0,
        "the full stop is no digit, and all of the completion must match",
        parameters={"pattern": r"\d+"},
    ),
    "json_schema": Example(
        "Who wrote the first program?",
        '{"name": "Ada", "born": 1815}',
        1.0,
        "an object with the name that is required, of the right type",
        parameters={"expected": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}},
    ),
    "cosine_length": Example(
        "2+2=",
        "4",
        0.75,
        "right, and of half of max_len: in the middle between 1 (as short as can be) and 0.5",
        {"answer": "4"},
        {"max_len": 6, "correct": "exact_match"},
        completion_ids=(7, 8, 9),
    ),
    "soft_overlong": Example(
        "Tell me a story.",
        "Once upon a time ...",
        -0.5,
        "9 tokens are in the middle of the last 2 of 10, over which it falls from 0 to -1",
        parameters={"max_completion_len": 10, "soft_punish_cache": 2},
        completion_ids=tuple(range(9)),
    ),
    "repetition_penalty": Example(
        "Count to three.",
        "1 2 3 1 2 3",
        -0.25,
        "of 4 runs of 3 tokens one was there before",
        completion_ids=(1, 2, 3, 1, 2, 3),
    ),
    "code": Example(
        "Write double(x).",
        _CODE,
        0.5,
        "one of two tests is passed, and credit is by share",
        {"tests": ["assert double(2) == 4", "assert double('a') == 'a'"]},
        {"credit": "share"},
    ),
    "judge": Example(
        "Why is the sky blue?",
        "Air scatters blue light more than red.",
        0.8,
        "8 on the way from 0 (minimum) to 10 (maximum)",
        parameters={"model": "a-model-of-your-server"},
        reply="Right, and brief.\nScore: 8",
    ),
    "environment": Example(
        "Guess my number.",
        "Is it 7?",
        0.7,
        "what the environment gave in the turns of the episode; the stage adds the column",
        {"environment_reward": 0.7},
    ),
}
"""By the reward's name."""
