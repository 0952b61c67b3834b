"""What allocators hold beyond what is in use: bytes held for a tensor over its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

Device = Literal["cpu", "cuda"]

ALLOCATOR_SHARE: Mapping[Device, float] = {"cpu": 0.12, "cuda": 0.05}
"""Of what is in use at the peak. On a CPU as measured by `tests/benchmarks/memory_prediction.py`; on a GPU assumed, not
measured."""
HEAP_BYTES = 32 * 2**20
"""Tensors below this size come from a CPU's heap, as `flows.command` sets it."""
HEAP_SHARE = 1.0
"""Of tensors in the heap: holes that freed ones of other lengths leave behind. Measured likewise."""


def slack(tensor_bytes: float, device: Device) -> float:
    """Bytes held for every byte of tensors of this size that come and go: 1 and more."""
    in_heap = device == "cpu" and tensor_bytes < HEAP_BYTES
    return 1 + (HEAP_SHARE if in_heap else ALLOCATOR_SHARE[device])


def room_for(tensors: Sequence[int], device: Device) -> float:
    """Bytes held for tensors of these sizes."""
    return sum(slack(size, device) * size for size in tensors)
