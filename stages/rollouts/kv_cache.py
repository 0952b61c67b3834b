"""Keys and values of the tokens so far, without copying them all for every new token."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from artifacts.errors import StageError

if TYPE_CHECKING:
    from torch import LongTensor

STATES = "cache_params"
"""What models whose layers are all recurrent call their cache."""


class ReservedLayer(DynamicLayer):
    """A full-attention layer that writes new tokens into room reserved for `capacity` tokens.

    transformers' own layer concatenates everything for each token. `keys` and `values` are [rows, heads,
    tokens, size], views of the reserved room.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new tokens and give all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        assert self.keys is not None and self.values is not None
        length = self.keys.shape[2]
        end = length + key_states.shape[2]
        if self._room is None:
            self._reserve(self.keys, self.values)
        assert self._room is not None and end <= self.capacity
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, length:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order; a row may be asked for more than once."""
        assert self.keys is not None and self.values is not None
        self._reserve(self.keys.index_select(0, beam_idx), self.values.index_select(0, beam_idx))

    def _reserve(self, keys: Tensor, values: Tensor) -> None:
        rows, heads, length, _ = keys.shape
        self._room = (
            keys.new_empty(rows, heads, self.capacity, keys.shape[3]),
            values.new_empty(rows, heads, self.capacity, values.shape[3]),
        )
        for room, states in zip(self._room, (keys, values), strict=True):
            room[:, :, :length] = states
        self.keys, self.values = (room[:, :, :length] for room in self._room)


def reserved_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """A cache with room for `capacity` tokens; sliding-window and linear layers stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [ReservedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def cache_name(model: Any) -> str:
    """What the model's forward pass calls its cache. Raises StageError where it takes none: it would be swallowed with
    all that a pass does not know, and every token be the first."""
    known = signature(model.forward).parameters
    for name in ("past_key_values", STATES):
        if name in known:
            return name
    raise StageError(
        f"{type(model).__name__} takes no cache of the tokens before, so completions cannot be sampled from it; take a "
        "model of another architecture"
    )


def keep_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep these rows of the batch, in this order; a row may be asked for more than once."""
    cache.reorder_cache(cast("LongTensor", rows))
