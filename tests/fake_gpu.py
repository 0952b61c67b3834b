"""A GPU that is none: tensors of the CPU that say to be on cuda:0, and operators that treat them as a GPU would.

It raises where an operator meets tensors of both devices, where one has no deterministic or no kernel at all on CUDA,
and where numpy is given a tensor of the device; and it counts what waits for the device. The numbers are the CPU's.

What it cannot see: kernels that there are on CUDA alone, memory, streams, and what C++ code asks of a device by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import accelerate
import torch
import torch._dynamo  # what a mode imports at its first call
from torch import Tensor
from torch.utils import checkpoint
from torch.utils._pytree import tree_iter
from transformers import modeling_utils

from tests.fake_device import CPU, GPU, FakeGpu, is_gpu
from tests.fake_functions import Functions, is_on
from tests.fake_operators import Operators


@contextmanager
def modes(gpu: FakeGpu) -> Iterator[None]:
    """In this thread."""
    with Operators(gpu), Functions(gpu):
        yield


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Inside, accelerate finds it, and new threads have it too."""
    gpu = FakeGpu()
    group = torch._C._group_tensors_by_device_and_dtype
    run_thread, run_engine = threading.Thread.run, torch.autograd._engine_run_backward

    def with_modes(thread: threading.Thread) -> None:
        with modes(gpu):
            run_thread(thread)

    def engine(*args: Any, **kwargs: Any) -> Any:
        # a function's mode is off inside of it, and so it would be in all that a way back calls
        with gpu.called(0), nullcontext() if is_on() else Functions(gpu):
            return run_engine(*args, **kwargs)

    with (
        mock.patch.object(accelerate.Accelerator, "device", property(lambda _: GPU)),
        mock.patch.object(threading.Thread, "run", with_modes),
        mock.patch.object(torch.autograd, "_engine_run_backward", engine),
        mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", partial(_grouped, gpu, group)),
        mock.patch.object(torch, "Generator", _Generator),
        mock.patch.object(torch.cuda, "synchronize", lambda *_: gpu.wait("synchronize")),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        # saved tensors are looked at outside of these modes, and again inside
        mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, default=_shape_and_type),
        mock.patch.object(modeling_utils, "caching_allocator_warmup", lambda *_: None),
        modes(gpu),
    ):
        yield gpu


class _Generator(torch.Generator):
    """On the device that it was made for, as is said."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls, device="cpu")
        made.place = GPU if is_gpu(device) else CPU
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place


def _grouped(gpu: FakeGpu, plain: Callable[..., Any], tensors: Any, with_indices: bool = False) -> Any:
    """Tensors by device and type."""
    found = {}
    for (device, dtype), parts in plain(tensors, with_indices).items():
        there = any(gpu.place(one) for one in tree_iter(parts) if isinstance(one, Tensor))
        found[GPU if there else device, dtype] = parts
    return found


def _shape_and_type(tensor: Tensor) -> dict[str, Any]:
    return {"shape": tensor.shape, "dtype": tensor.dtype}
