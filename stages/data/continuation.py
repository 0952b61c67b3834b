"""What stands between two turns of the assistant: the answers to it as the chat template writes them, as token ids.

The tokens of a turn that a model wrote are kept as they are: tokenizing its text again could give others. So of a
conversation that goes on, only what the template writes behind the turn's end token is tokenized, in its place after a
turn of the same kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from artifacts.errors import DataError
from stages.data.assistant import UnclearTurnError, assistant_spans
from stages.data.types import Message

_QUESTION: Message = {"role": "user", "content": "a"}


class Continuation:
    """The answers to a turn of the assistant, up to where it is asked to go on."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises DataError for a tokenizer without a chat template, or without offsets."""
        if not tokenizer.chat_template:
            raise DataError("conversations of several turns need a chat template, which the tokenizer does not have")
        if not tokenizer.is_fast:
            raise DataError("conversations of several turns need a fast tokenizer (tokenizer.json); this one is slow")
        self._tokenizer = tokenizer
        self._added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        self._before: dict[tuple[Any, ...], str] = {}
        """Kind of conversation -> what is written up to the end of the assistant's turn."""
        self._known: dict[tuple[str, str], tuple[int, list[int]]] = {}

    def after_turn(self, answers: Sequence[Message], called: str | None, *, ended: bool = True) -> list[int]:
        """Token ids of `answers` with what the template writes around them.

        `called`: the tool that the turn calls; None: it calls none. ended: the turn has its end token already; else
        that comes first. Raises DataError where the template refuses the answers, or mixes them with the turn.
        """
        talk = [_QUESTION, _turn(called, answers), *answers]
        text = self._render(talk, True)
        kind = (called, *(answer["role"] for answer in answers))
        before = self._before.get(kind)
        if before is None or not text.startswith(before):
            before = self._before[kind] = self._up_to_the_end(talk, text)
        known = before, text[len(before) :]
        if known not in self._known:
            self._known[known] = self._cut(text, len(before))
        end_id, token_ids = self._known[known]
        return list(token_ids) if ended else [end_id, *token_ids]

    def _up_to_the_end(self, talk: Sequence[Message], text: str) -> str:
        try:
            ((_, stop),) = assistant_spans(talk, self._render_or_unclear, self._added)
        except UnclearTurnError as error:
            raise DataError(f"the chat template cannot be continued turn by turn: {error}") from error
        if self._render(talk, False)[:stop] != text[:stop]:
            raise DataError(
                "the chat template cannot be continued turn by turn: it writes a turn in another way once more is asked"
            )
        return text[:stop]

    def _cut(self, text: str, stop: int) -> tuple[int, list[int]]:
        """(the last token before that place, the tokens from there on)."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places, ids = encoded["offset_mapping"], encoded["input_ids"]
        first = next((number for number, (_, end) in enumerate(places) if end > stop), len(ids))
        if first == len(ids) or places[first][0] < stop:
            raise DataError(
                f"the tokenizer makes one token of the end of a turn and what follows ({text[stop - 9 : stop + 9]!r}), "
                "so a conversation cannot be continued token by token; end turns with a token of its own"
            )
        return ids[first - 1], list(ids[first:])

    def _render(self, talk: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
        messages = [dict(message) for message in talk]
        try:
            return str(
                self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
            )
        except Exception as error:  # the template is a program of somebody else
            raise DataError(f"the chat template refuses the answers {messages[2:]!r:.200}: {error}") from error

    def _render_or_unclear(self, talk: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
        try:
            return self._render(talk, generation_prompt)
        except DataError as error:
            raise UnclearTurnError(str(error)) from error


def _turn(called: str | None, answers: Sequence[Message]) -> Message:
    if called is None:
        return {"role": "assistant", "content": "b"}
    call = {"type": "function", "function": {"name": called, "arguments": {}}}
    identified = {"id": answers[0]["tool_call_id"], **call} if "tool_call_id" in answers[0] else call
    return {"role": "assistant", "content": "", "tool_calls": [identified]}
