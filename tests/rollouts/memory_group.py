"""A group of a trainer and workers that hand tensors over in memory, where NCCL would."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.waiting import LIMIT_SECONDS


class MemoryGroup:
    """The trainer's end; `worker(rank)` is another's."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.waiting: dict[int, queue.Queue[Tensor]] = {rank: queue.Queue() for rank in range(1, size)}
        self.sent: list[Tensor] = []
        self.closed = False

    def broadcast(self, packed: Tensor) -> Callable[[], bool]:
        self.sent.append(packed.clone())
        for one in self.waiting.values():
            one.put(packed.clone())
        return lambda: all(one.empty() for one in self.waiting.values())

    def close(self) -> None:
        self.closed = True

    def worker(self, rank: int) -> Worker:
        return Worker(self.waiting[rank])


class Worker:
    """What a worker of vLLM has for a communicator."""

    def __init__(self, waiting: queue.Queue[Tensor]) -> None:
        self.waiting = waiting

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        """As NCCL does it: the receiver has to expect as many bytes as are sent."""
        assert src == 0
        received = self.waiting.get(timeout=LIMIT_SECONDS)
        assert (received.dtype, received.numel()) == (tensor.dtype, tensor.numel()) and tensor.dtype == torch.uint8
        tensor.copy_(received.view(tensor.shape))

    def destroy(self) -> None:
        pass
