"""Completions as another model's tokenizer sees them: text, rendered and tokenized anew."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

from stages.data.chat import Encoder
from stages.data.encode import arguments_of, common_prefix, tools_of
from stages.data.types import ROW_ID, Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Retokenizer:
    """Prompts with their completions, as rows of a preference dataset would be tokenized."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encoder = Encoder(tokenizer)

    def __call__(self, row: Row, texts: Sequence[str], finished: Sequence[bool]) -> tuple[list[int], list[list[int]]]:
        """(tokens that all begin with, the rest of each, never empty) of one prompt's completions.

        Plain text ends with the end token where the completion was finished; a conversation as the chat template
        ends a turn, also a completion that was cut off. Raises DataError naming the row.
        """
        prompt = row["prompt"]
        if isinstance(prompt, str):
            joined = [
                self._encoder.texts([prompt + text], end=ended)[0] for text, ended in zip(texts, finished, strict=True)
            ]
            (alone,) = self._encoder.texts([prompt], end=False)
        else:
            (alone,) = self._conversations(row, [prompt], generation_prompt=True)
            turns = [[*prompt, {"role": "assistant", "content": text}] for text in texts]
            joined = self._conversations(row, turns, generation_prompt=False)
        shared = reduce(min, (common_prefix(alone, ids) for ids in joined), len(alone))
        shared = min(shared, *(len(ids) - 1 for ids in joined)) if joined else shared
        return alone[:shared], [ids[shared:] for ids in joined]

    def _conversations(
        self, row: Row, conversations: Sequence[Sequence[Message]], *, generation_prompt: bool
    ) -> list[list[int]]:
        rows = [row] * len(conversations)
        return self._encoder.conversations(
            conversations,
            [row[ROW_ID]] * len(rows),
            tools_of(rows),
            arguments_of(rows),
            generation_prompt=generation_prompt,
        )
