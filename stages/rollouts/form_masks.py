"""Which tokens may come next where completions are held to a form, by llguidance; row by row.

B rows in the making, V vocabulary of the model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy
import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.rollouts.rows import Leaving, Row
from stages.rollouts.structured import Structured

_WORD = 32
_known: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()
"""Tokenizers as llguidance knows them, which takes it a second for a large one."""


class FormMasks:
    """Row b has a state of its own, that of the tokens it was given; nothing of other rows is in it."""

    def __init__(self, structured: Structured, tokenizer: Any, end_token_ids: Collection[int], vocabulary: int) -> None:
        """Raises StageError where llguidance is not installed, or does not take tokenizer or form."""
        self._ends, self._vocabulary = sorted(end_token_ids), vocabulary
        reader = _reader(tokenizer, tuple(self._ends), vocabulary)
        self._words = -(-reader.vocab_size // _WORD)
        self._begin = _begun(structured, reader)
        self._matchers: list[Any] = []

    def enter(self, count: int) -> None:
        """New rows, without tokens."""
        self._matchers += [self._begin.deep_copy() for _ in range(count)]

    def allowed_BV(self, rows: Sequence[Row]) -> Tensor:
        """bool: tokens after which the form can still be completed, and end tokens where it is complete. Raises
        StageError where there are none, and where a grammar has an end token within the form."""
        bits_BW = numpy.zeros((len(rows), self._words), numpy.int32)
        for matcher, bits_W in zip(self._matchers, bits_BW, strict=True):
            matcher.unsafe_compute_mask_ptr(bits_W.ctypes.data, bits_W.nbytes)
        flags_BV = numpy.unpackbits(bits_BW.view(numpy.uint8), axis=1, bitorder="little")[:, : self._vocabulary]
        allowed_BV = torch.from_numpy(flags_BV.view(numpy.bool_))
        complete_B1 = torch.tensor([[bool(matcher.is_accepting())] for matcher in self._matchers])
        self._refuse_ends_within(rows, allowed_BV[:, self._ends] & ~complete_B1)
        # an end is one token for whoever samples, whatever text the tokenizer has for it
        allowed_BV[:, self._ends] = complete_B1
        for row, matcher, is_open in zip(rows, self._matchers, allowed_BV.any(1).tolist(), strict=True):
            if (problem := matcher.get_error()) or not is_open:
                raise StageError(f"structured: a completion of prompt {row.request} cannot go on: {_first(problem)}")
        return allowed_BV

    def _refuse_ends_within(self, rows: Sequence[Row], within_BE: Tensor) -> None:
        """Whoever samples stops at an end token, so nothing of the form could follow it."""
        for row, matcher, within_E in zip(rows, self._matchers, within_BE, strict=True):
            # one that has stopped has nothing but ends, for whatever reason
            if within_E.any() and not matcher.is_stopped():
                named = ", ".join(str(token) for token, is_in in zip(self._ends, within_E, strict=True) if is_in)
                raise StageError(
                    f"structured: the grammar has end tokens ({named}) within a completion of prompt {row.request}; "
                    "a completion ends by itself where its form is complete: leave them out of the grammar"
                )

    def take(self, tokens: Sequence[int]) -> None:
        """One of each row."""
        for matcher, token in zip(self._matchers, tokens, strict=True):
            if token not in self._ends and not matcher.consume_token(token):
                raise StageError(f"structured: llguidance did not take token {token}: {_first(matcher.get_error())}")

    def leave(self, leaving: Leaving) -> None:
        """The last rows take the places that become free."""
        leaving.apply(self._matchers)


def spelled_out(structured: Structured, tokenizer: Any) -> list[str]:
    """Added tokens, special or of the shape `<...>`, whose text is part of the form's: llguidance lets only a grammar's
    `<...>` be written by them."""
    texts = structured.texts
    added = sorted(tokenizer.added_tokens_decoder.values(), key=str)
    found = [one.content for one in added if one.special or re.fullmatch("<.*>", one.content, re.DOTALL)]
    return [content for content in found if content in texts]


def check_form(
    structured: Structured | None, tokenizer: Any, end_token_ids: Collection[int], say: Callable[[str], None]
) -> None:
    """Before anything is sampled, by whatever engine: a line where there are such tokens. Raises StageError for a
    grammar in which an end token has a place: vLLM would stop at it, and say that the form is complete."""
    if structured is None:
        return
    for word in structured.tokens:
        if ends := [token for token in sorted(end_token_ids) if _stands_for(word, token, tokenizer)]:
            named = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in ends)
            raise StageError(
                f"structured: the grammar's {word} allows the end token {named} within a completion, which ends by "
                "itself where its form is complete: leave it out of the grammar"
            )
    if found := spelled_out(structured, tokenizer):
        say(
            f"structured: {', '.join(found)} of the form are written in other tokens than the added ones of these "
            "names; for those, give a grammar that names them without quotes"
        )


def _stands_for(word: str, token: int, tokenizer: Any) -> bool:
    """Whether a word of a grammar, such as `<think>` or `<[^1-2,7]>`, allows the token."""
    if not (ranges := re.fullmatch(r"<\[(\^?)([\d,*-]+)\]>", word)):
        return bool(tokenizer.get_vocab().get(word) == token)
    pairs = [one.partition("-")[::2] for one in ranges[2].split(",")]
    is_in = any(low == "*" or int(low) <= token <= int(high or low) for low, high in pairs)
    return is_in != bool(ranges[1])


def _begun(structured: Structured, reader: Any) -> Any:
    from llguidance import LLMatcher

    matcher = LLMatcher(reader, LLMatcher.grammar_from_lark(structured.lark))
    if problem := matcher.get_error():
        raise StageError(f"structured: {_first(problem)}")
    return matcher


def _reader(tokenizer: Any, end_token_ids: tuple[int, ...], vocabulary: int) -> Any:
    """The tokenizer as llguidance knows it, with a place for every token of the model."""
    known = _known.setdefault(tokenizer, {})
    key = (vocabulary, *end_token_ids)
    if key in known:
        return known[key]
    try:
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        install = "pip install 'posttrain[structured]'"
        raise StageError(f"structured needs the package llguidance, which is not installed: {install}") from error
    try:
        highest = max(tokenizer.get_vocab().values())  # of a tokenizer with ids that are no token's, beyond its number
        found = from_tokenizer(
            _with_bytes(tokenizer), n_vocab=max(vocabulary, highest + 1), eos_token=list(end_token_ids)
        )
    except ValueError as error:
        raise StageError(f"structured: llguidance does not take the model's tokenizer: {error}") from error
    known[key] = found
    return found


def _with_bytes(tokenizer: Any) -> Any:
    """The tokenizer, or a copy that says more of how its tokens become text: that of `init_model` for characters just
    joins them, which llguidance knows of tokenizers that have single bytes besides."""
    from tokenizers import decoders

    if not (tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.decoder, decoders.Fuse)):
        return tokenizer
    copied = copy.deepcopy(tokenizer)
    copied.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return copied


def _first(problem: str) -> str:
    """The first line, which says it; more is the state of a parser."""
    said = problem.split("\n", 1)[0]
    if not said or said.startswith("NoExtension"):
        return "no token of the tokenizer continues the form, and it is not complete; give one that its tokens write"
    return said
