"""The sampler's attention in the place of a transformers model's own, while it samples.

The model is run without a cache: every layer hands its new queries, keys and values to the pass in progress, which
keeps them and answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn

from stages.rollouts.partial_attention import Scores
from stages.training.attention import UNKNOWN_ARGUMENTS, UnsupportedAttentionError
from stages.training.trunk import language_model

_NAME = "embedded_sampler"


class Pass(Protocol):
    """A forward pass as its layers see it."""

    def attend(self, layer: int, query_nhTd: Tensor, key_nkTd: Tensor, value_nkTd: Tensor, scores: Scores) -> Tensor:
        """[n, T, h, d]."""


_in_progress: ContextVar[Pass] = ContextVar("pass in progress")
windows_seen: ContextVar[set[int | None] | None] = ContextVar("windows seen", default=None)
"""Set while a model is probed: the sliding windows that its layers ask for."""


@contextmanager
def in_progress(current: Pass) -> Iterator[None]:
    """Forward passes inside attend by `current`."""
    token = _in_progress.set(current)
    try:
        yield
    finally:
        _in_progress.reset(token)


@contextmanager
def sampling_attention(model: Any) -> Iterator[None]:
    """Inside, the model attends by the pass in progress."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    # no mask is registered under the name, so transformers makes none
    model = language_model(model)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(  # noqa: PLR0913 - the signature is transformers'
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if unknown := [name for name in UNKNOWN_ARGUMENTS if kwargs.get(name) is not None]:
        raise UnsupportedAttentionError(f"its attention takes {', '.join(unknown)}")
    if (windows := windows_seen.get()) is not None:
        windows.add(sliding_window)
    layer: Any = module.layer_idx
    scores = Scores(scaling if scaling is not None else query.shape[-1] ** -0.5, sliding_window, softcap)
    # under autocast, what was rotated is float32 again
    return _in_progress.get().attend(int(layer), query.to(value.dtype), key.to(value.dtype), value, scores), None
