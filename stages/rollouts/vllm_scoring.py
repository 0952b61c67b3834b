"""Log-probabilities of given tokens, by what vLLM tells of the places of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Likely = list[tuple[int, float]]
"""Tokens that are likely in a place, with their log-probabilities."""

NO_PLACES = (KeyError, TypeError, ValueError, AttributeError)
"""What reading places raises where an answer has none."""


@dataclass(frozen=True)
class Scoring(Generic[T]):
    """What is asked of every place of a completion, all but whose last token are part of a prompt for the server."""

    what: str
    """Of an answer, in words."""
    asked: Callable[[Sequence[int], Sequence[int]], dict[str, Any]]
    """(prompt, completion) -> what a request says of it."""
    read: Callable[[dict[str, Any], int, Sequence[int]], list[T]]
    """(a choice of the answer, tokens of the prompt, completion) -> of each place. Raises one of NO_PLACES."""


def own_tokens() -> Scoring[float]:
    """The log-probability of the token that is there."""

    def asked(prompt: Sequence[int], completion: Sequence[int]) -> dict[str, Any]:
        return {**_reading(prompt, completion, 0), "logprobs": 1, "logprob_token_ids": [completion[-1]]}

    def read(choice: dict[str, Any], start: int, completion: Sequence[int]) -> list[float]:
        return [place[token] for place, token in zip(_places(choice, start), completion, strict=True)]

    return Scoring("log-probabilities of a prompt's tokens", asked, read)


def likeliest_tokens(most: int) -> Scoring[Likely]:
    """So many tokens that are likeliest there, the likeliest first."""

    def asked(prompt: Sequence[int], completion: Sequence[int]) -> dict[str, Any]:
        return {**_reading(prompt, completion, most), "logprobs": most}

    def read(choice: dict[str, Any], start: int, completion: Sequence[int]) -> list[Likely]:
        return [_likeliest(place, most) for place, _ in zip(_places(choice, start), completion, strict=True)]

    return Scoring(f"{most} likeliest tokens of each place of a prompt", asked, read)


def _reading(prompt: Sequence[int], completion: Sequence[int], most: int) -> dict[str, Any]:
    """All but the last token are read, and one is drawn for its place: what fills the model's context would leave no
    room for one behind it, and vLLM does not read without drawing."""
    return {"prompt": [*prompt, *completion[:-1]], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": most}


def _places(choice: dict[str, Any], start: int) -> list[dict[int, float]]:
    """Token -> log-probability, of every place from `start` on; the last one is that of the token that was drawn."""
    read = [
        {int(token): float(values["logprob"]) for token, values in place.items()}
        for place in choice["prompt_logprobs"][start:]
    ]
    (drawn,) = choice["logprobs"]["top_logprobs"]
    return [*read, {int(name.removeprefix("token_id:")): float(value) for name, value in drawn.items()}]


def _likeliest(place: dict[int, float], most: int) -> Likely:
    """Of a place, which may have another token beside them."""
    found = sorted((-value, token) for token, value in place.items())
    if len(found) < most:
        raise ValueError(f"{len(found)} tokens")
    return [(token, -negative) for negative, token in found[:most]]
