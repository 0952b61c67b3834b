"""From text and conversations to token ids, by the tokenizer's own rules; assistant tokens from its template.

Only this module calls a tokenizer for training data.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from artifacts.errors import DataError
from stages.data.assistant import UnclearTurnError, assistant_spans
from stages.data.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoder:
    """A tokenizer as training sees it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template: str | None = tokenizer.chat_template and tokenizer.get_chat_template()
        unknown = tokenizer.unk_token_id
        # where one token serves as unknown and as end of text or pad (GPT-2), it says nothing about unknowns
        ambiguous = unknown in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id)
        self._unknown_id = None if ambiguous else unknown

    def unknown(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens stand for text that the tokenizer cannot represent."""
        return 0 if self._unknown_id is None else sum(token == self._unknown_id for token in token_ids)

    def texts(self, texts: Sequence[str], *, end: bool) -> list[list[int]]:
        """Token ids with the tokenizer's own start token, never twice, and one end token if `end`.

        Raises DataError when `end` is asked for and the tokenizer has no end-of-text token.
        """
        eos, bos = self._tokenizer.eos_token_id, self._tokenizer.bos_token_id
        if end and eos is None:
            raise DataError("the tokenizer has no eos_token, so a model could not learn to stop; set one")
        encoded = []
        for token_ids in self._tokenizer(list(texts), add_special_tokens=True)["input_ids"] if texts else []:
            ids = list(token_ids)
            if bos is not None and ids[:2] == [bos, bos]:  # the text brought its own
                del ids[0]
            while ids and ids[-1] == eos and (len(ids) > 1 or eos != bos):  # the same for its end
                del ids[-1]
            encoded.append([*ids, eos] if end else ids)
        return encoded

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that stand inside others: without start and end tokens."""
        return (
            [list(ids) for ids in self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []
        )

    def conversations(
        self,
        conversations: Sequence[Sequence[Message]],
        row_ids: Sequence[str],
        *,
        generation_prompt: bool = False,
    ) -> list[list[int]]:
        """Token ids of each conversation through the chat template, which writes its own start token."""
        rendered = [
            self._render(messages, row_id, generation_prompt=generation_prompt)[0]
            for messages, row_id in zip(conversations, row_ids, strict=True)
        ]
        if not rendered:
            return []
        return [list(ids) for ids in self._tokenizer(rendered, add_special_tokens=False)["input_ids"]]

    def assistant_masks(
        self, conversations: Sequence[Sequence[Message]], row_ids: Sequence[str]
    ) -> list[tuple[list[int], list[bool]]]:
        """(token ids, whether each token is the assistant's), its end-of-turn token included.

        By the template's {% generation %} markers where it has them; otherwise as `assistant_spans` finds the turns.
        Raises DataError naming the row where neither says. Spans are matched by offsets: transformers' own mask stops
        or runs to the end where a span's first or last character belongs to no token.
        """
        marked = _GENERATION.search(self._required_template()) is not None
        if not self._tokenizer.is_fast:
            raise DataError("assistant_only_loss needs a fast tokenizer (tokenizer.json); this one is a slow one")
        masked = []
        for messages, row_id in zip(conversations, row_ids, strict=True):
            text, spans = self._render(messages, row_id, spans=True) if marked else self._derived(messages, row_id)
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = list(encoded["input_ids"])
            masked.append((ids, _inside(encoded["offset_mapping"], spans)))
        return masked

    def _derived(self, messages: Sequence[Message], row_id: str) -> tuple[str, list[tuple[int, int]]]:
        def render(part: Sequence[Message], generation_prompt: bool) -> str:
            return self._render(part, row_id, generation_prompt=generation_prompt)[0]

        added = [token.content for token in self._tokenizer.added_tokens_decoder.values()]
        try:
            return render(messages, False), assistant_spans(messages, render, added)
        except UnclearTurnError as error:
            raise DataError(
                f"row {row_id}: assistant_only_loss: what of the rendered conversation is the assistant's cannot be "
                f"told ({error}); put {{% generation %}} and {{% endgeneration %}} around it in the chat template"
            ) from error

    def _required_template(self) -> str:
        if not self._template:
            raise DataError(
                "the dataset is conversational and the tokenizer has no chat template; use a chat model's "
                "tokenizer, or give text columns (prompt, completion) instead of messages"
            )
        return self._template

    def _render(
        self,
        messages: Sequence[Message],
        row_id: str,
        *,
        generation_prompt: bool = False,
        spans: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        settings: dict[str, Any] = dict(self._tokenizer.special_tokens_map)
        try:
            rendered: Any = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self._required_template(),
                return_assistant_tokens_mask=spans,
                add_generation_prompt=generation_prompt,
                **settings,
            )
        except TemplateError as error:
            raise DataError(f"row {row_id}: the chat template refuses this conversation: {error}") from error
        texts, found = rendered
        return texts[0], found[0] if spans else []


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token shares a character with one of the spans (both in order)."""
    mask = []
    position = 0
    for start, stop in offsets:
        while position < len(spans) and spans[position][1] <= start:
            position += 1
        mask.append(position < len(spans) and start < stop and stop > spans[position][0])
    return mask
