"""Where a transformers model keeps what comes before its head."""

from __future__ import annotations

from typing import Any

from artifacts.errors import StageError


def trunk_of(model: Any) -> Any:
    """The layers under the head: called with `input_ids`, it gives the `last_hidden_state` [B, T, H] that the head
    reads. Raises StageError where a class does not say which they are."""
    trunk = model.base_model
    if trunk is model:  # Llama 4 names another part than it has
        trunk = getattr(model, "model", None)
    if trunk is None:
        raise StageError(f"{type(model).__name__} does not say which of its parts are under its head; not supported")
    return trunk
