"""Where a transformers model keeps what comes before its head, and how long its rows may be.

A multimodal model holds a language model beside what sees or hears; here it is taken for its language model alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from artifacts.errors import StageError

UNBOUNDED = sys.maxsize
"""Tokens of a row where positions are a recurrent state's or a slope's (ALiBi), not those of a table."""
_LONGEST = ("max_position_embeddings", "max_seq_len")
"""What configurations call the most tokens of a row; the second is MPT's."""


def is_multimodal(config: Any) -> bool:
    """Whether what a configuration says of text is nested in it, beside what it says of images, videos or sound."""
    return config.get_text_config() is not config


def language_model(model: Any) -> Any:
    """The part whose configuration and attention are those of text: the model, or one inside a multimodal one."""
    return trunk_of(model) if is_multimodal(model.config) else model


def trunk_of(model: Any) -> Any:
    """The layers under the head: called with `input_ids`, it gives the `last_hidden_state` [B, T, H] that the head
    reads. Raises StageError where a class does not say which they are."""
    trunk = model.get_decoder() if is_multimodal(model.config) else model.base_model
    if trunk is model:  # Llama 4 names another part than it has
        trunk = getattr(model, "model", None)
    elif hasattr(trunk, "lm_head"):  # in its multimodal class the head is inside
        return trunk_of(trunk)
    if trunk is None:
        raise StageError(f"{type(model).__name__} does not say which of its parts are under its head; not supported")
    return trunk


def paths_of_text(model: Any) -> list[str]:
    """Where the language model and the head of a multimodal model are in it."""
    parts = [trunk_of(model), model.get_output_embeddings(), getattr(model, "score", None)]
    return [path for path, module in model.named_modules() if any(module is part for part in parts)]


def text_parameters(model: Any) -> Iterator[Any]:
    """Those that a pass over text goes through, each once."""
    if not is_multimodal(model.config):
        yield from model.parameters()
        return
    inside = tuple(f"{path}." for path in paths_of_text(model))
    yield from (parameter for name, parameter in model.named_parameters() if name.startswith(inside))


def context_of(config: Any) -> int:
    """Most tokens of a row, by the configuration of a model; UNBOUNDED where it says nothing."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _LONGEST)
    return int(next((longest for longest in found if longest is not None), UNBOUNDED))
