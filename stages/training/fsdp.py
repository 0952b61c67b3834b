"""torch's FSDP2: parameters, gradients and optimizer state in slices, one decoder layer gathered at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from artifacts.errors import StageError
from stages.sharding import Fsdp
from stages.training.batch import TokenBatch
from stages.training.config import TrainingConfig
from stages.training.model import Scorer
from stages.training.objective import Readout
from stages.training.optimization import Optimization
from stages.training.probes import scorers_in
from stages.training.processes import Processes


class FullySharded:
    """Every process has a slice of every parameter.

    Embedding, final norm and head belong to no layer: they are gathered once a forward pass and stay until its
    backward pass is over, so a readout may use the head's weight as it is. Gradients are reduced after every
    micro-batch: whole ones would take the memory that sharding saves.
    """

    lockstep = True

    def __init__(self, scorer: Scorer, config: TrainingConfig, processes: Processes, sharding: Fsdp) -> None:
        # objectives do not change what a readout gave them in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        self.scorer, self.processes = scorer, processes
        mesh = init_device_mesh(processes.device.type, (processes.size,))
        low = torch.bfloat16 if config.bf16 else None
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in _layers(scorer, sharding.layer_names):
            fully_shard(layer, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward, mp_policy=policy)
        fully_shard(scorer, mesh=mesh, mp_policy=policy)
        trained = {name: one for name, one in scorer.named_parameters() if one.requires_grad}
        self.optimization = Optimization(trained, config, processes)

    def forward(self, batch: TokenBatch, readout: Readout) -> Any:
        """Gathers the layers on the way."""
        return self.scorer(batch, readout)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """The slices' gradients are means over processes; undo that."""
        (loss * self.processes.size).backward()

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Over all slices."""
        return self.optimization.gradient_norm()

    def step(self, rate: float) -> None:
        """Of this process's slices."""
        self.optimization.step(rate)

    def discard(self) -> None:
        """Forget the gradients."""
        self.optimization.discard()

    def shapes(self) -> Mapping[str, torch.Size]:
        """Of the whole tensors."""
        return {name: one.shape for name, one in self.optimization.trained.items()}

    def weight(self, name: str) -> Tensor:
        """Gathered from all slices."""
        return _whole(self.optimization.trained[name].detach())

    def moments(self, name: str) -> dict[str, Tensor]:
        """Gathered from all slices."""
        return {key: _whole(value) for key, value in self.optimization.moments(name).items()}

    @torch.no_grad()
    def put(self, name: str, weight: Tensor) -> None:
        """Keep this process's slice."""
        parameter = self.optimization.trained[name]
        parameter.copy_(_sliced_like(parameter, weight))

    @torch.no_grad()
    def load(self, name: str, weight: Tensor, moments: Mapping[str, Tensor], steps: int) -> None:
        """Keep this process's slices."""
        self.put(name, weight)
        parameter = self.optimization.trained[name]
        own = {key: _sliced_like(parameter, value) for key, value in moments.items()}
        self.optimization.set_moments(name, own, steps)

    def loaded(self) -> None:
        """Let go of what was gathered of the weights before: a pass that no backward pass followed left some."""
        for module in self.scorer.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _layers(scorer: Scorer, names: frozenset[str]) -> Iterator[nn.Module]:
    own = [getattr(one.transformers_model, "_no_split_modules", None) or () for one in scorers_in(scorer)]
    wanted = names or frozenset(name for classes in own for name in classes)
    found = [module for module in scorer.modules() if type(module).__name__ in wanted]
    if not found:
        raise StageError(
            f"{type(scorer.transformers_model).__name__} has no layers of class {', '.join(sorted(wanted)) or '(none)'}"
            ", to gather one at a time; name them as fsdp_transformer_layer_cls_to_wrap in the launcher's fsdp_config"
        )
    yield from found


def _whole(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def _sliced_like(parameter: Tensor, whole: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    # every process has the whole tensor, so nothing needs to be sent
    return distribute_tensor(
        whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
