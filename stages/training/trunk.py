"""Where a transformers model keeps what comes before its head, and how long its rows may be."""

from __future__ import annotations

import sys
from typing import Any

from artifacts.errors import StageError

UNBOUNDED = sys.maxsize
"""Tokens of a row where positions are a recurrent state's or a slope's (ALiBi), not those of a table."""
_LONGEST = ("max_position_embeddings", "max_seq_len")
"""What configurations call the most tokens of a row; the second is MPT's."""


def trunk_of(model: Any) -> Any:
    """The layers under the head: called with `input_ids`, it gives the `last_hidden_state` [B, T, H] that the head
    reads. Raises StageError where a class does not say which they are."""
    trunk = model.base_model
    if trunk is model:  # Llama 4 names another part than it has
        trunk = getattr(model, "model", None)
    if trunk is None:
        raise StageError(f"{type(model).__name__} does not say which of its parts are under its head; not supported")
    return trunk


def context_of(config: Any) -> int:
    """Most tokens of a row, by the configuration of a model; UNBOUNDED where it says nothing."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _LONGEST)
    return int(next((longest for longest in found if longest is not None), UNBOUNDED))
