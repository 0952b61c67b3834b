"""Keys and values in room that is reserved once, a slot for every row or prompt.

S slots, k key heads, C tokens of a slot, d head size.
"""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

_ALIGNMENT = 64


class Arena:
    """[S, k, C, d] keys and values of every layer. What is not written yet is zero, so that it may be multiplied."""

    def __init__(self, slots: int, tokens: int, layers: int) -> None:
        self.slots, self.tokens = slots, tokens
        self._number = layers
        self._rooms: list[Tensor] = []
        """[R, S, k, C, d]: room of all layers together, and of those that are of another size."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, key_nkTd: Tensor, value_nkTd: Tensor) -> tuple[Tensor, Tensor]:
        """The room of a layer, reserved when its first keys and values are seen."""
        if layer not in self._layers:
            self._layers[layer] = self._reserve(layer, key_nkTd, value_nkTd)
        return self._layers[layer]

    def known(self, layer: int) -> tuple[Tensor, Tensor]:
        """The room of a layer that has been written to."""
        return self._layers[layer]

    def move(self, places: Tensor, sources: Tensor, tokens: int) -> None:
        """Slots `places` take over the first `tokens` tokens of the slots `sources`."""
        for room in self._rooms:
            part = room[:, :, :, :tokens]
            part.index_copy_(1, places, part.index_select(1, sources))

    def _reserve(self, layer: int, key_nkTd: Tensor, value_nkTd: Tensor) -> tuple[Tensor, Tensor]:
        key, value = ((one.shape[1], one.shape[3], one.dtype) for one in (key_nkTd, value_nkTd))
        if key == value and layer < self._number:
            if not self._rooms:
                self._rooms.append(self._room(2 * self._number, key_nkTd))
            together = self._rooms[0]
            if (together.shape[2], together.shape[4], together.dtype) == key:
                return together[2 * layer], together[2 * layer + 1]
        apart = [self._room(1, one) for one in (key_nkTd, value_nkTd)]
        self._rooms += apart
        return apart[0][0], apart[1][0]

    def _room(self, number: int, like_nkTd: Tensor) -> Tensor:
        _, heads, _, size = like_nkTd.shape
        return zeros((number, self.slots, heads, self.tokens, size), like_nkTd.dtype, like_nkTd.device)


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
