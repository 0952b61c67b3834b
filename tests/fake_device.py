"""Where tensors are that all are the CPU's, and what would have waited if some were a GPU's."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_iter

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
_OWN = "/tests/fake_"
"""In the paths of these files."""


@dataclass
class FakeGpu:
    """What is there, and what waited for it."""

    waits: Counter[str] = field(default_factory=Counter)
    """Operator, file and line -> how often the host waited there."""
    _places: dict[int, tuple[StorageWeakRef, bool]] = field(default_factory=dict)
    """Storages of the GPU (True), and of what autograd made by itself, which is on either (False)."""
    _limit: int = 4096
    _own: threading.local = field(default_factory=threading.local)

    def place(self, tensor: Tensor) -> bool | None:
        """True: on the GPU; False: on either; None: on the host."""
        key = key_of(tensor)
        found = None if key is None else self._places.get(key)
        return None if found is None else found[1]

    def put(self, tensor: Tensor, place: bool | None) -> None:
        """Say where the memory of a tensor is."""
        memory = memory_of(tensor)
        if memory is None or memory.device.type != "cpu":
            return
        if place is None:
            self._places.pop(memory._cdata, None)
            return
        self._places[memory._cdata] = (StorageWeakRef(memory), place)
        if len(self._places) > self._limit:
            self._places = {key: one for key, one in list(self._places.items()) if not one[0].expired()}
            self._limit = 2 * len(self._places) + 4096

    def wait(self, what: str) -> None:
        """The host waits for the device."""
        self.waits[f"{what} at {site()}"] += 1

    def outputs(self, found: Any, place: bool | None) -> Any:
        """All tensors of a result, which are there then."""
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor):
                self.put(tensor, place)
        return found

    @property
    def depth(self) -> int:
        """In how many functions of torch this thread is that Python called."""
        return getattr(self._own, "depth", 0)

    @contextmanager
    def called(self, depth: int) -> Iterator[None]:
        before, self._own.depth = self.depth, depth
        try:
            yield
        finally:
            self._own.depth = before


def is_gpu(device: Any) -> bool:
    return isinstance(device, int) or torch.device(device).type == "cuda"


def memory_of(tensor: Tensor) -> torch.UntypedStorage | None:
    with torch._C.DisableTorchFunction():
        try:
            return (tensor._values() if tensor.layout == torch.sparse_coo else tensor).untyped_storage()
        except (NotImplementedError, RuntimeError):
            return None


def key_of(tensor: Tensor) -> int | None:
    memory = memory_of(tensor)
    return None if memory is None else memory._cdata


def site() -> str:
    """The innermost line that is not torch's, and that of the product."""
    frame, inner = sys._getframe(1), ""
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and _OWN not in path:
            place = f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno}"
            if "/stages/" in path and "/tests/" not in path:
                return place if not inner else f"{place} ({inner})"
            inner = inner or place
        frame = frame.f_back
    return inner
