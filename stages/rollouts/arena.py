"""Keys and values in room that is reserved once, a slot for every row or prompt.

S slots, k key heads, C tokens of a slot, d head size.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy
import torch
from torch import Tensor

_ALIGNMENT = 64


class Arena:
    """[S, k, C, d] keys and values of every layer. What is not written yet is zero, so that it may be multiplied."""

    def __init__(self, slots: int, tokens: int) -> None:
        self.slots, self.tokens = slots, tokens
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, key_nkTd: Tensor, value_nkTd: Tensor) -> tuple[Tensor, Tensor]:
        """The room of a layer, reserved when its first keys and values are seen."""
        if layer not in self.layers:
            self.layers[layer] = self._reserve(key_nkTd), self._reserve(value_nkTd)
        return self.layers[layer]

    def move(self, places: Tensor, sources: Tensor, tokens: int) -> None:
        """Slots `places` take over the first `tokens` tokens of the slots `sources`."""
        for room in self._rooms():
            room[:, :, :tokens].index_copy_(0, places, room[:, :, :tokens].index_select(0, sources))

    def _rooms(self) -> Iterable[Tensor]:
        return (room for both in self.layers.values() for room in both)

    def _reserve(self, like_nkTd: Tensor) -> Tensor:
        _, heads, _, size = like_nkTd.shape
        return zeros((self.slots, heads, self.tokens, size), like_nkTd.dtype, like_nkTd.device)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU such that memory is taken where something is written, and not before."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = dtype.itemsize
    for length in shape:
        size *= length
    # numpy asks the system for zeroed pages, which it gives one by one; torch would write them all
    room = torch.from_numpy(numpy.zeros(size + _ALIGNMENT, dtype=numpy.uint8))
    start = -room.data_ptr() % _ALIGNMENT
    return room[start : start + size].view(dtype).view(shape)
