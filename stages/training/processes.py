"""The processes that train together, and what has to be settled before any of them computes."""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from artifacts.errors import StageError
from stages.context import Context
from stages.garbage import look_as_usual
from stages.sharding import Sharding, Whole, sharding_of_environment

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def of(cls, accelerator: Accelerator) -> Processes:
        """As accelerate has found them."""
        return cls(accelerator.process_index, accelerator.num_processes, accelerator.device)

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def give(self, values: Tensor, owner: int) -> Tensor:
        """The values of process `owner`, on all of them, in place."""
        if self.size > 1:
            dist.broadcast(values, src=owner)
        return values

    def share(self, value: T) -> T:
        """The first process's value, on all of them. Small objects only."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def gathered(value: T) -> list[T]:
    """The value of every process, by rank. Collective; small objects only."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def prepare_process(context: Context) -> Accelerator:
    """Deterministic algorithms, a fixed number of threads, and the process group. What loads models is imported."""
    sharding = launched_sharding()
    if context.threads is not None:
        torch.set_num_threads(context.threads)
    torch.use_deterministic_algorithms(True)
    # nothing here reads memory before it has written it, and filling it first costs a pass for every tensor
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    if not torch.cuda.is_available():  # several libraries import DeepSpeed where it is installed, and it asks aloud
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    importlib.import_module("transformers.models.auto.modeling_auto")
    look_as_usual()
    accelerator = Accelerator(
        mixed_precision="no",  # weights are in the type that is computed in
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=1,
    )
    if accelerator.num_processes != context.processes:
        raise StageError(f"{context.processes} processes were asked for, {accelerator.num_processes} found each other")
    if not isinstance(sharding, Whole) and not dist.is_initialized():  # a single process can be sharded as well
        dist.init_process_group("nccl" if accelerator.device.type == "cuda" else "gloo")
    return accelerator


@functools.cache
def launched_sharding() -> Sharding:
    """How the launcher of this process wants models sharded.

    The first call switches accelerate's own sharding off: it and transformers would act on these variables as well
    (load a model as shards or not at all, refuse CPUs), and the reference, teacher and reward models stay whole.
    """
    sharding = sharding_of_environment(os.environ)
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        if name in os.environ:
            os.environ[name] = "false"
    return sharding
