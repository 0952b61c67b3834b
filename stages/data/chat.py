"""From text and conversations to token ids, by the tokenizer's own rules and its chat template.

Only this module calls a tokenizer for training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from artifacts.errors import DataError
from stages.data.assistant import inside
from stages.data.chat_template import Arguments, ChatTemplate, Tools
from stages.data.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """A tokenizer as training sees it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
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
        tools: Sequence[Tools] | None = None,
        arguments: Sequence[Arguments] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> list[list[int]]:
        """Token ids of each conversation through the chat template, which writes its own start token.

        `tools`: schemas of the tools of each conversation; `arguments`: further ones of the template. Raises DataError
        where the template does not show the tools or read the arguments.
        """
        return self.pieces(self.shown(conversations, row_ids, tools, arguments, generation_prompt=generation_prompt))

    def shown(
        self,
        conversations: Sequence[Sequence[Message]],
        row_ids: Sequence[str],
        tools: Sequence[Tools] | None = None,
        arguments: Sequence[Arguments] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> list[str]:
        """The text of each conversation, whose token ids `conversations` gives."""
        return [
            self._template.text(messages, row_id, given, generation_prompt=generation_prompt)
            for messages, row_id, given in self._template.each(conversations, row_ids, tools, arguments)
        ]

    def assistant_masks(
        self,
        conversations: Sequence[Sequence[Message]],
        row_ids: Sequence[str],
        tools: Sequence[Tools] | None = None,
        arguments: Sequence[Arguments] | None = None,
    ) -> list[tuple[list[int], list[bool]]]:
        """(token ids, whether each token is the assistant's), its end-of-turn token included.

        As `ChatTemplate.with_spans` tells. Raises DataError naming the row where it cannot. Spans are matched by
        offsets: transformers' own mask stops or runs to the end where a span's first or last character belongs to no
        token.
        """
        self._template.require()
        if not self._tokenizer.is_fast:
            raise DataError("assistant_only_loss needs a fast tokenizer (tokenizer.json); this one is a slow one")
        masked = []
        for messages, row_id, given in self._template.each(conversations, row_ids, tools, arguments):
            text, spans = self._template.with_spans(messages, row_id, given)
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = list(encoded["input_ids"])
            masked.append((ids, inside(encoded["offset_mapping"], spans)))
        return masked

    def rendered(self, messages: Sequence[Message], row_id: str) -> tuple[str, str | None]:
        """(a conversation as text, all of it that the assistant says; None: it cannot be told)."""
        self._template.require()
        text = self._template.text(messages, row_id)
        try:
            text, spans = self._template.with_spans(messages, row_id)
        except DataError:
            return text, None
        return text, "".join(text[start:stop] for start, stop in spans)

    def last_turn(self, messages: Sequence[Message], row_id: str, tools: Tools, arguments: Arguments) -> str:
        """What the last message of a conversation says, as `ChatTemplate.last_turn` tells."""
        ((_, _, given),) = self._template.each([messages], [row_id], [tools], [arguments])
        return self._template.last_turn(messages, row_id, given)
