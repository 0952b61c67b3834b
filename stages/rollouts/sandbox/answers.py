"""Reading what a program sent, as one would read a letter from a stranger."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True)
class Answer:
    """The value of an expression as data (see values.py), or why there is none."""

    data: Any = None
    error: str | None = None


def answers(sent: bytes, count: int, problem: str | None) -> list[Answer]:
    """One answer for each of `count` questions. More lines than that are no answers at all, whatever they say.

    problem: why the program ended, given as the error of questions without an answer.
    """
    *lines, _ = sent.split(b"\n")
    if len(lines) > count:
        return [Answer(error="sent more answers than there were questions")] * count
    missing = Answer(error=problem or "ended before it answered")
    return [*map(_answer, lines), *[missing] * (count - len(lines))]


def _answer(line: bytes) -> Answer:
    try:
        read = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return Answer(error="sent no JSON")
    if isinstance(read, dict) and list(read) == ["value"]:
        return Answer(data=read["value"])
    if isinstance(read, dict) and list(read) == ["error"]:
        return Answer(error=str(read["error"]))
    return Answer(error="sent neither a value nor an error")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
