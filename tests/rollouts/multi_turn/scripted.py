"""A sampler that says what a script has, over tokenizers of one token a character."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter
from tokenizers import decoders

from stages.data.chat import Encoder
from stages.data.tokenize import TokenizedPrompt
from stages.rollouts.multi_turn.loop import MultiTurn
from stages.rollouts.multi_turn.settings import MultiTurnConfig
from stages.rollouts.requests import Completion, Progress, SampleRequest, SamplingConfig
from stages.seeds import derive
from tests.data.chat_templates import tokenizer_of, unmarked

HERE = "tests.rollouts.multi_turn.user_code"
END = "<|im_end|>"


class Script:
    """The k-th turn of a completion is the k-th text of its seed."""

    def __init__(self, tokenizer: Any, texts: Mapping[int, Sequence[str]]) -> None:
        self.tokenizer = tokenizer
        self.requests: list[list[SampleRequest]] = []
        self.turns = {
            seed if number == 0 else derive(seed, "turn", number): text
            for seed, own in texts.items()
            for number, text in enumerate(own)
        }

    def sample(
        self, requests: Sequence[SampleRequest], settings: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        self.requests.append(list(requests))
        return [
            [self._turn(seed, limit) for seed, limit in zip(request.seeds, request.limits or (), strict=True)]
            for request in requests
        ]

    def _turn(self, seed: int, limit: int) -> Completion:
        ids = spelled(self.tokenizer, self.turns[seed])[:limit]
        finished = bool(ids) and ids[-1] == self.tokenizer.eos_token_id
        return Completion(ids, [-(number + 1) / 8 for number in range(len(ids))], finished)


def spelled(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokenizer(template: str, **tokens: str) -> Any:
    made = tokenizer_of(unmarked(template), **{"eos_token": END, **tokens})
    made.backend_tokenizer.decoder = decoders.Fuse()
    return made


def multi_turn(tokenizer: Any, **settings: Any) -> MultiTurn:
    """With settings as a recipe has them."""
    config = TypeAdapter(MultiTurnConfig).validate_json(json.dumps(settings))
    return MultiTurn(tokenizer, config, [tokenizer.eos_token_id])


def prompt(made: MultiTurn, tokenizer: Any, messages: list[dict[str, Any]], **columns: Any) -> TokenizedPrompt:
    """Row r0 as the stage tokenizes it."""
    row = {"row_id": "r0", "prompt": messages, **columns}
    if made.tools is not None:
        row = made.tools.checked(row)
    (ids,) = Encoder(tokenizer).conversations([messages], ["r0"], [row.get("tools")], generation_prompt=True)
    return TokenizedPrompt("r0", ids, row)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(list(ids)))
