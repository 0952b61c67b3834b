"""A completion in vLLM's words: what it is asked for, and what its answer must hold to be believed."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.errors import StageError
from stages.rollouts.engine import ServedModel
from stages.rollouts.requests import Completion, SampleRequest, SamplingConfig

_SEEDS = 2**62
"""vLLM's seeds are signed integers of 64 bits, and it counts on from one for the completions of a prompt."""


FORM = "structured_outputs"
FORM_READER = "guidance"
"""What vLLM reads forms with: llguidance, as the embedded sampler does."""


@dataclass(frozen=True)
class Asked:
    """One completion that is wanted."""

    request: int
    """Which of the requests it is of."""
    place: int
    """Among the request's completions."""
    prompt_ids: list[int]
    seed: int
    """That of the prompt's first completion, plus the place."""
    limit: int
    """Most tokens."""
    name: str
    """Of its prompt, in messages."""


def require_bytes(tokenizer: Path) -> None:
    """For forms vLLM has to know the bytes of every token. Raises StageError for a tokenizer whose decoder does not say
    them, before vLLM ends in the middle of a generation."""
    file = tokenizer / "tokenizer.json"
    if not file.is_file():
        raise StageError(
            f"structured: vLLM holds to a form only models whose folder says in tokenizer.json what bytes its tokens "
            f"are; {tokenizer} has none; save the tokenizer as a fast one, or leave rollouts out"
        )
    decoder = json.loads(file.read_bytes()).get("decoder") or {}
    kinds = {one["type"] for one in (decoder, *decoder.get("decoders", ()))} if decoder else set()
    if not kinds & {"ByteLevel", "ByteFallback"}:
        raise StageError(
            f"structured: vLLM holds to a form only models whose tokenizer works on bytes; this one's decoder is "
            f"{' and '.join(sorted(kinds)) or 'none'}; leave rollouts out, or make the model with tokenizer: byte_bpe"
        )


def wanted(requests: Sequence[SampleRequest], most: int) -> list[Asked]:
    """Completion by completion, those of no tokens left out. Raises StageError for a prompt without tokens."""
    found = []
    for number, request in enumerate(requests):
        name = f"prompt {number}" if request.row_id is None else f"row {request.row_id}"
        if not request.prompt_ids:
            raise StageError(f"{name} has no tokens; there is nothing to continue")
        limits = request.limits or (most,) * len(request.seeds)
        first = request.seeds[0] % _SEEDS if request.seeds else 0
        found += [
            Asked(number, place, list(request.prompt_ids), first + place, limit, name)
            for place, (_, limit) in enumerate(zip(request.seeds, limits, strict=True))
            if limit > 0
        ]
    return found


def bundles(asked: Sequence[Asked]) -> list[list[Asked]]:
    """Completions that one question with a number (`n`) asks for: of one prompt, one limit, and places in a row."""
    found: list[list[Asked]] = []
    for one in asked:
        last = found[-1][-1] if found else None
        follows = last is not None and (last.request, last.place + 1, last.limit) == (one.request, one.place, one.limit)
        if follows:
            found[-1].append(one)
        else:
            found.append([one])
    return found


def filled(
    requests: Sequence[SampleRequest], asked: Sequence[Asked], completions: Sequence[Completion]
) -> list[list[Completion]]:
    """By request, in the order of its seeds; empty where none was asked for."""
    results = [[Completion([], [], False)] * len(request.seeds) for request in requests]
    for one, completion in zip(asked, completions, strict=True):
        results[one.request][one.place] = completion
    return results


def stop_tokens(model: ServedModel, settings: SamplingConfig) -> list[int]:
    """All tokens that end a completion."""
    return sorted({*model.end_token_ids, *settings.stop_token_ids})


def parameters(asked: Asked, settings: SamplingConfig, stops: Sequence[int]) -> dict[str, Any]:
    """Under names that `SamplingParams` and the body of /v1/completions share.

    The ends are given as `stop_token_ids` alone (`ignore_eos`), so that no end but ours counts, and they stay in the
    completion.
    """
    form = {} if settings.structured is None else {FORM: {"grammar": settings.structured.lark_with_ends(stops)}}
    return form | {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": settings.min_p,
        "repetition_penalty": settings.repetition_penalty,
        "seed": asked.seed,
        "max_tokens": asked.limit,
        "stop": list(settings.stop_strings),
        "stop_token_ids": list(stops),
        "ignore_eos": True,
        "logprobs": 0,
    }


@dataclass(frozen=True)
class Answer:
    """What vLLM gave back for one completion, not yet believed."""

    token_ids: Any
    logprobs: Any
    finish_reason: Any
    weights: Sequence[int] = ()
    """Numbers of those behind each token, where they may change in the middle."""


class Reading:
    """Turns answers into completions. Raises StageError, with the prompt's name, for one that cannot be."""

    def __init__(self, model: ServedModel, settings: SamplingConfig, stops: Collection[int], source: str) -> None:
        self._vocabulary, self._settings, self._stops, self._source = model.vocabulary, settings, set(stops), source

    def completion(self, asked: Asked, answer: Answer) -> Completion:
        """The answer, if it is one to what was asked."""
        for problem in self._problems(asked, answer):
            raise StageError(f"{self._source} answered {asked.name} with {problem}; its log may say why")
        logprobs = [float(value) for value in answer.logprobs]
        plain = [] if self._settings.changes_the_distribution() else list(logprobs)
        finished = answer.finish_reason == "stop"
        free = [] if self._settings.structured is None else [math.nan] * len(logprobs)
        return Completion(list(answer.token_ids), logprobs, finished, plain, free, list(answer.weights))

    def _problems(self, asked: Asked, answer: Answer) -> Iterator[str]:
        tokens, logprobs, reason = answer.token_ids, answer.logprobs, answer.finish_reason
        if not _is_list_of(tokens, int) or not _is_list_of(logprobs, (int, float)):
            yield "something else than token ids with a log-probability each (is it vLLM, and of a version we know?)"
            return
        if len(tokens) != len(logprobs):
            yield f"{len(tokens)} tokens and {len(logprobs)} log-probabilities"
        if not tokens:
            yield "no token"
            return
        if not 0 <= min(tokens) <= max(tokens) < self._vocabulary:
            strange = min(tokens) if min(tokens) < 0 else max(tokens)
            yield f"token {strange}; the model knows {self._vocabulary}: it serves another model"
        if not all(math.isfinite(value) and value < 1e-3 for value in logprobs):
            yield "log-probabilities that are no numbers below 0: its weights may be damaged"
        if reason == "length" and len(tokens) != asked.limit:
            yield f"{len(tokens)} tokens, as if that were its limit, which is {asked.limit}"
        if reason == "stop" and tokens[-1] not in self._stops and not self._settings.stop_strings:
            yield f"an end after token {tokens[-1]}, which ends nothing"
        if len(tokens) > asked.limit:
            yield f"{len(tokens)} tokens, more than its limit of {asked.limit}"
        if reason not in ("length", "stop"):
            yield f"finish_reason {reason!r}, which is neither stop nor length"


def _is_list_of(values: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, kinds) and not isinstance(value, bool) for value in values
    )
