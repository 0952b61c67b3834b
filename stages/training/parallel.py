"""How a model and its optimizer are spread over processes: what the loop asks of every way, and the choice of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from stages.sharding import Fsdp, Sharding, Zero
from stages.training.batch import TokenBatch
from stages.training.config import TrainingConfig
from stages.training.model import Scorer
from stages.training.objective import Readout
from stages.training.probes import settle_layout
from stages.training.processes import Processes

_BUCKET_BYTES = 2**28


class Parallel(Protocol):
    """A model and its optimizer over all processes. Trained tensors go by their names in the Scorer.

    The weights that are updated, saved and exported are float32; with `bf16` forward and backward passes use
    bfloat16 copies of them, with `pure_bf16` there are no others. What is called collective must be called by all
    processes in the same order.
    """

    lockstep: bool
    """Whether every forward and backward pass is collective."""

    def forward(self, batch: TokenBatch, readout: Readout) -> Any:
        """The Scorer's forward pass."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a loss already divided by the items of all processes; `last`: of this step."""
        ...

    def gradient_norm(self) -> Tensor:
        """Sum the gradients over processes; their norm, on the device. Collective; once before `step`."""
        ...

    def step(self, rate: float) -> None:
        """Clip, update with this learning rate, forget the gradients."""
        ...

    def discard(self) -> None:
        """Forget the gradients; the weights stay as they are."""
        ...

    def shapes(self) -> Mapping[str, torch.Size]:
        """Every trained tensor, in the same order on every process."""
        ...

    def weight(self, name: str) -> Tensor:
        """A whole trained tensor as it is updated, to read and to let go. Collective."""
        ...

    def moments(self, name: str) -> dict[str, Tensor]:
        """Its whole optimizer state; empty before the first step. Collective."""
        ...

    def put(self, name: str, weight: Tensor) -> None:
        """Take a whole tensor, given on every process, in the place of one; `loaded` once all are there."""
        ...

    def load(self, name: str, weight: Tensor, moments: Mapping[str, Tensor], steps: int) -> None:
        """Take up a whole tensor and its state after `steps` steps, given on every process."""
        ...

    def loaded(self) -> None:
        """All tensors have been loaded or put. Collective."""
        ...


def spread(scorer: Scorer, config: TrainingConfig, processes: Processes, sharding: Sharding) -> Parallel:
    """The model, spread as the launcher says. Its parameters may be replaced by slices."""
    if isinstance(sharding, Fsdp):
        from stages.training.fsdp import FullySharded

        return FullySharded(scorer, config, processes, sharding)
    if isinstance(sharding, Zero):
        from stages.training.zero import ZeroSharded

        return ZeroSharded(scorer, config, processes, sharding)
    from stages.training.replicated import Replicated

    return Replicated(scorer, config, processes)


@torch.no_grad()
def copy_weights(parallel: Parallel, target: Scorer | None) -> None:
    """The present weights into another Scorer of the same model, one tensor at a time. Collective; processes without
    a target only help."""
    parameters = {} if target is None else dict(target.named_parameters())
    for name in parallel.shapes():
        weight = parallel.weight(name)
        if target is not None:
            parameters[name].copy_(weight)


def float_weights(
    names: Iterable[str], weight_of: Callable[[str], Tensor], wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[dict[str, Tensor]]:
    """The whole tensors of these names in float32, some at a time; those that are not `wanted` only help. Collective,
    where `weight_of` is."""
    bucket: dict[str, Tensor] = {}
    for name in names:
        weight = weight_of(name).detach()
        if wanted(name):
            bucket[name] = weight.float()
        if sum(one.nbytes for one in bucket.values()) >= _BUCKET_BYTES:
            yield bucket
            bucket = {}
    if bucket:
        yield bucket


class PolicyCopy:
    """The whole model in every process, beside its shards: generation takes a number of steps of its own there."""

    def __init__(self, parallel: Parallel, rebuild: Callable[[], Scorer], device: torch.device, bf16: bool) -> None:
        self.parallel = parallel
        self.scorer = rebuild().eval().requires_grad_(False)
        if bf16:
            use_bfloat16(self.scorer)
        self.scorer.to(device)
        settle_layout(self.scorer)
        self.refresh()

    def refresh(self) -> None:
        """Take over the present weights. Collective."""
        copy_weights(self.parallel, self.scorer)


def use_bfloat16(scorer: Scorer) -> None:
    """Parameters only: buffers hold what needs precision, such as rotary frequencies. Quantized ones stay, and their
    layers compute in it."""
    for parameter in scorer.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    layer: Any
    for layer in scorer.modules():
        if hasattr(layer, "compute_dtype"):  # of bitsandbytes
            layer.compute_dtype = torch.bfloat16
