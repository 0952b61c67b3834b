"""A row as one of two tokenizers reads it: its tokens, and which bytes of the completion each of them stands for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stages.data.assistant import UnclearTurnError
from stages.data.chat import Encoder
from stages.data.common_ends import Part, token_after
from stages.data.encode import arguments_of, common_prefix, tools_of
from stages.data.token_bytes import Span, TokenBytes
from stages.data.types import ROW_ID, Message, Row

_TRIAL = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "bcd"}]


class UnreadableError(Exception):
    """A row that a tokenizer, or its chat template, does not give back as it is; says what differs."""


@dataclass(frozen=True)
class Reading:
    """Tokens; those of the completion stand for the bytes of `part.region`."""

    token_ids: list[int]
    part: Part
    end: int | None = None
    """The place of the token that says that the completion is over; None: none does."""
    problem: str | None = None
    """What differs from the text, behind the last of the spans; None: nothing."""

    def first(self, most: int) -> Reading:
        """The first tokens alone."""
        if most >= len(self.token_ids):
            return self
        end = self.end if self.end is not None and self.end < most else None
        spans, region = self.part
        return Reading(self.token_ids[:most], Part(spans[:most], region), end, self.problem)


class Reader:
    """A tokenizer, with its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises DataError for a tokenizer whose tokens are no pieces of the text."""
        self.bytes = TokenBytes(tokenizer)
        self.end_token: int | None = tokenizer.eos_token_id
        self._encoder = Encoder(tokenizer)

    def given(self, row: Row, *, trimmed: bool = False) -> Reading:
        """A row of prompt and completion as it is trained on. A conversation is rendered as a whole; `trimmed`: its
        completion without the white space around it, which templates may leave out. Tool calls are what the template
        makes of them.

        Raises UnreadableError where the template does not show the completion.
        """
        if isinstance(row["prompt"], str):
            return self._plain(row["prompt"], row["completion"], end=True)
        content = self.called(row) if calls_tools(row) else _only_content(row["completion"])
        content = content.strip() if trimmed else content
        text, start = self._shown(row, content)
        token_ids = self._encoder.pieces([text])[0]
        reading = self._reading(token_ids, text, Span(start, start + len(content.encode())))
        end = token_after(reading.part)
        is_end = end is not None and token_ids[end] in self.bytes.added
        return Reading(token_ids, reading.part, end if is_end else None, reading.problem)

    def called(self, row: Row) -> str:
        """How the template shows a completion that calls tools, without what ends it. Raises UnreadableError where that
        cannot be told."""
        _require_one_message(row["completion"])
        try:
            (tools,), (arguments,) = tools_of([row]), arguments_of([row])
            messages = [*row["prompt"], *row["completion"]]
            return self._encoder.last_turn(messages, row[ROW_ID], tools, arguments)
        except UnclearTurnError as error:
            raise UnreadableError(f"how the chat template shows its tool calls cannot be told ({error})") from error

    def prompt(self, row: Row) -> Reading:
        """A row's prompt alone, as it is before a completion."""
        return self.continued(row, "", ended=False)

    def continued(self, row: Row, text: str, *, ended: bool) -> Reading:
        """A row's prompt with `text` behind it, as if this model had written it; `ended`: and the end of its turn."""
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return self._plain(prompt, text, end=ended)
        (shown,) = self._encoder.shown([prompt], *_beside(row), generation_prompt=True)
        token_ids = self._encoder.pieces([shown + text])[0]
        start = len(shown.encode())
        reading = self._reading(token_ids, shown + text, Span(start, start + len(text.encode())))
        if not ended or self._turn_end is None or reading.problem is not None:
            return reading
        spans = [*reading.part.spans, Span(reading.part.region.stop, reading.part.region.stop)]
        return Reading([*token_ids, self._turn_end], Part(spans, reading.part.region), len(token_ids))

    def written(self, token_ids: list[int], *, ended: bool) -> tuple[Reading, str]:
        """(tokens that this model has written, `ended` by the last of them; their text as far as it is text)."""
        body = token_ids[:-1] if ended else token_ids
        written = self.bytes.joined(body)
        spans, stop = [], 0
        for token in body:
            spans.append(Span(stop, stop + len(self.bytes.piece(token))))
            stop = spans[-1].stop
        text = _text_at_the_start(written)
        whole = len(text.encode()) == len(written)
        spans += [Span(stop, stop)] * ended
        end = len(body) if ended and whole else None
        return Reading(token_ids, Part(spans, Span(0, len(text.encode()))), end), text

    @cached_property
    def _turn_end(self) -> int | None:
        """The token by which the template ends a turn; the end of all text, where it ends it by none."""
        prompt, completion = _TRIAL
        trial = {ROW_ID: "of a trial", "prompt": prompt, "completion": completion}
        try:
            reading = self.given(trial)
        except UnreadableError:
            return self.end_token
        return self.end_token if reading.end is None else reading.token_ids[reading.end]

    def _plain(self, prompt: str, text: str, *, end: bool) -> Reading:
        token_ids = self._encoder.texts([prompt + text], end=end)[0]
        start = len(prompt.encode())
        reading = self._reading(token_ids, prompt + text, Span(start, start + len(text.encode())))
        return Reading(token_ids, reading.part, len(token_ids) - 1 if end else None, reading.problem)

    def _reading(self, token_ids: list[int], text: str, region: Span) -> Reading:
        spans, misread = self.bytes.spans(token_ids, text.encode())
        return Reading(token_ids, Part(spans, region), problem=None if misread is None else misread.detail)

    def _shown(self, row: Row, content: str) -> tuple[str, int]:
        """(the conversation as the template shows it, the byte at which the completion begins)."""
        (whole,) = self._encoder.shown([[*row["prompt"], *row["completion"]]], *_beside(row))
        for opened in (True, False):  # what opens the completion may be its own beginning, such as <think>
            (alone,) = self._encoder.shown([row["prompt"]], *_beside(row), generation_prompt=opened)
            start = whole.find(content, common_prefix(alone, whole))
            if start >= 0:
                return whole, len(whole[:start].encode())
        raise UnreadableError(f"the chat template does not show the completion as it is ({content[:40]!r})")


def _beside(row: Row) -> tuple[list[str], Any, Any]:
    return [row[ROW_ID]], tools_of([row]), arguments_of([row])


def calls_tools(row: Row) -> bool:
    """Whether the completion is one of a conversation, and has tool calls."""
    return not isinstance(row["prompt"], str) and any(message.get("tool_calls") for message in row["completion"])


def _require_one_message(completion: list[Message]) -> None:
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        raise UnreadableError("the completion is not one message of the assistant's")


def _only_content(completion: list[Message]) -> str:
    """Raises UnreadableError unless the completion is one text of the assistant's."""
    _require_one_message(completion)
    return str(completion[0].get("content") or "")


def _text_at_the_start(written: bytes) -> str:
    """What comes before the first bytes that are no character."""
    try:
        return written.decode()
    except UnicodeDecodeError as error:
        return written[: error.start].decode()
