"""A tokenizer's chat template: conversations as text, and which of it the assistant says.

What a row brings beside its messages, the template has to show or read: else a model would learn without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from artifacts.errors import DataError
from stages.data.assistant import Span, UnclearTurnError, assistant_spans, with_ends
from stages.data.template_limits import check_template
from stages.data.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = list[dict[str, Any]] | None
"""JSON schemas of what the assistant may call in a conversation."""

Arguments = Mapping[str, Any] | None
"""Further arguments of the chat template in a conversation, such as {"enable_thinking": False}."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NAME = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True)
class Given:
    """What the chat template is given of a row beside messages."""

    tools: Tools = None
    arguments: Arguments = None


NOTHING = Given()


class ChatTemplate:
    """The template of one tokenizer, which may have none: then every use raises DataError."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template: str | None = tokenizer.chat_template and tokenizer.get_chat_template()
        if self._template:
            check_template(self._template)
        self._shown: set[str] = set()
        """Of tools and tool calls, what the template was seen to show."""

    def require(self) -> str:
        """The template itself. Raises DataError where there is none."""
        if not self._template:
            raise DataError(
                "the dataset is conversational and the tokenizer has no chat template; give the model one with a stage "
                "set_chat_template, or text columns (prompt, completion) instead of messages"
            )
        return self._template

    @cached_property
    def has_markers(self) -> bool:
        """Whether it marks what the assistant says, by {% generation %}."""
        return _GENERATION.search(self.require()) is not None

    def text(
        self, messages: Sequence[Message], row_id: str, given: Given = NOTHING, *, generation_prompt: bool = False
    ) -> str:
        """A conversation as text. Raises DataError naming the row where the template refuses it."""
        return self._render(messages, row_id, given, generation_prompt=generation_prompt)[0]

    def with_spans(self, messages: Sequence[Message], row_id: str, given: Given = NOTHING) -> tuple[str, list[Span]]:
        """(a conversation as text, what of it the assistant says). By the template's {% generation %} markers where it
        has them, and the end-of-turn tokens that they leave out; otherwise as `assistant_spans` finds the turns. Raises
        DataError naming the row where neither says."""
        return (self._marked if self.has_markers else self._derived)(messages, row_id, given)

    def last_turn(self, messages: Sequence[Message], row_id: str, given: Given = NOTHING) -> str:
        """What the last message of a conversation says as the template shows it, tool calls too, without the token that
        ends it and the white space around it. Raises UnclearTurnError where that cannot be told."""
        start, stop = self._turns(messages, row_id, given)[-1]
        said = self.text(messages, row_id, given)[start:stop].strip()
        ends = [one.content for one in self._tokenizer.added_tokens_decoder.values() if one.special]
        end = max((one for one in ends if one and said.endswith(one)), key=len, default="")
        return said.removesuffix(end).strip()

    def each(
        self,
        conversations: Sequence[Sequence[Message]],
        row_ids: Sequence[str],
        tools: Sequence[Tools] | None,
        arguments: Sequence[Arguments] | None,
    ) -> Iterator[tuple[Sequence[Message], str, Given]]:
        """(messages, row id, the rest) of each; the first with tools shows whether the template knows them."""
        nothing = [None] * len(row_ids)
        pairs = zip(tools or nothing, arguments or nothing, strict=True)
        for messages, row_id, pair in zip(conversations, row_ids, pairs, strict=True):
            given = Given(*pair)
            self._require_read(row_id, given.arguments or {})
            if given.tools and "tools" not in self._shown:
                self._require_shown("tools", row_id, messages, given, messages, replace(given, tools=None))
            if "tool calls" not in self._shown and any("tool_calls" in message for message in messages):
                without = [{key: message[key] for key in message if key != "tool_calls"} for message in messages]
                self._require_shown("tool calls", row_id, messages, given, without, given)
            yield messages, row_id, given

    def _require_read(self, row_id: str, arguments: Mapping[str, Any]) -> None:
        """Raises DataError for an argument whose name the template does not hold."""
        for name in arguments:
            if name not in self._names:
                raise DataError(
                    f"row {row_id}: field 'chat_template_kwargs.{name}': the chat template does not read {name!r}, so "
                    f"it would change nothing; use a template that does, or leave it out of the dataset"
                )

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(_NAME.findall(self.require()))

    def _require_shown(
        self,
        what: str,
        row_id: str,
        messages: Sequence[Message],
        given: Given,
        other_messages: Sequence[Message],
        other_given: Given,
    ) -> None:
        """Raises DataError where a conversation looks the same without `what`."""
        rendered = self._render(messages, row_id, given)[0]
        try:
            shown = rendered != self._render(other_messages, row_id, other_given)[0]
        except DataError:  # the template misses them
            shown = True
        if not shown:
            raise DataError(
                f"row {row_id}: the chat template does not show {what}, so the model would not see them; use a "
                f"template that does, or leave them out of the dataset"
            )
        self._shown.add(what)

    def _marked(self, messages: Sequence[Message], row_id: str, given: Given) -> tuple[str, list[Span]]:
        text, spans = self._render(messages, row_id, given, spans=True)
        if self._ends_are_marked:
            return text, spans
        try:
            turns = self._turns(messages, row_id, given)
        except UnclearTurnError:
            return text, spans
        return text, with_ends(spans, turns, text, self._added_tokens)

    def _derived(self, messages: Sequence[Message], row_id: str, given: Given) -> tuple[str, list[Span]]:
        text, _ = self._render(messages, row_id, given)
        try:
            return text, self._turns(messages, row_id, given)
        except UnclearTurnError as error:
            raise DataError(
                f"row {row_id}: assistant_only_loss: what of the rendered conversation is the assistant's cannot be "
                f"told ({error}); put {{% generation %}} and {{% endgeneration %}} around it in the chat template"
            ) from error

    def _turns(self, messages: Sequence[Message], row_id: str, given: Given = NOTHING) -> list[Span]:
        """Raises UnclearTurnError."""

        def render(part: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
            try:
                return self._render(part, row_id, given, generation_prompt=generation_prompt)[0]
            except DataError as error:
                raise UnclearTurnError(f"the template refuses the conversation with another turn: {error}") from error

        return assistant_spans(messages, render, self._added_tokens)

    @cached_property
    def _added_tokens(self) -> list[str]:
        return [token.content for token in self._tokenizer.added_tokens_decoder.values()]

    @cached_property
    def _ends_are_marked(self) -> bool:
        """Whether the template's generation markers hold the end-of-turn token, by what they do with one exchange."""
        exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text, spans = self._render(exchange, "of a trial", spans=True)
            return spans == with_ends(spans, self._turns(exchange, "of a trial"), text, self._added_tokens)
        except (DataError, UnclearTurnError):
            return False

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        row_id: str,
        given: Given = NOTHING,
        *,
        generation_prompt: bool = False,
        spans: bool = False,
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        settings: dict[str, Any] = {**self._tokenizer.special_tokens_map, **(given.arguments or {})}
        try:
            rendered: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=None if given.tools is None else list(given.tools),
                chat_template=self.require(),
                return_assistant_tokens_mask=spans,
                add_generation_prompt=generation_prompt,
                **settings,
            )
            texts, found = rendered
            texts[0].encode("utf-8")  # half of a surrogate pair is text to Python and to no tokenizer
        except Exception as error:  # the template is a program of somebody else
            raise DataError(f"row {row_id}: the chat template refuses this conversation: {error}") from error
        return texts[0], found[0] if spans else []
