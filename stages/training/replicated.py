"""The whole model in every process; gradients are summed once a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stages.training.batch import TokenBatch
from stages.training.config import TrainingConfig
from stages.training.model import Scorer
from stages.training.objective import Readout
from stages.training.optimization import Optimization
from stages.training.parallel import use_bfloat16
from stages.training.processes import Processes

_BUCKET_BYTES = 64 * 2**20


class Replicated:
    """One process, or data parallel. A process needs the others once a step only, so they may do unequal work."""

    lockstep = False

    def __init__(self, scorer: Scorer, config: TrainingConfig, processes: Processes) -> None:
        self.scorer, self.processes = scorer.to(processes.device), processes
        scorer.merge_gradients()
        trained = {name: one for name, one in scorer.named_parameters() if one.requires_grad}
        self.masters = Masters(scorer, trained) if config.bf16 and not config.pure_bf16 else None
        if config.pure_bf16:
            use_bfloat16(scorer)
        kept = trained if self.masters is None else self.masters.weights
        self.optimization = Optimization(kept, config, processes)

    def forward(self, batch: TokenBatch, readout: Readout) -> Any:
        """The Scorer itself."""
        return self.scorer(batch, readout)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add to this process's gradients."""
        loss.backward()

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Sum over processes in pieces of bounded size, then the norm."""
        gradients = self.optimization.gradients()
        if self.processes.size > 1:
            for bucket in _buckets(gradients):
                flat = self.processes.sum(torch.cat([gradient.flatten() for gradient in bucket]).float())
                parts = flat.split([gradient.numel() for gradient in bucket])
                for gradient, part in zip(bucket, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))
        return self.optimization.gradient_norm()

    def step(self, rate: float) -> None:
        """The update, and the bfloat16 weights anew."""
        self.optimization.step(rate)
        if self.masters is not None:
            self.masters.publish()

    def discard(self) -> None:
        """Forget the gradients."""
        self.optimization.discard()

    def shapes(self) -> Mapping[str, torch.Size]:
        """Of the trained tensors."""
        return {name: one.shape for name, one in self.optimization.trained.items()}

    def weight(self, name: str) -> Tensor:
        """The tensor itself."""
        return self.optimization.trained[name].detach()

    def moments(self, name: str) -> dict[str, Tensor]:
        """The optimizer's tensors themselves."""
        return self.optimization.moments(name)

    @torch.no_grad()
    def put(self, name: str, weight: Tensor) -> None:
        """Copy into place."""
        self.optimization.trained[name].copy_(weight)

    def load(self, name: str, weight: Tensor, moments: Mapping[str, Tensor], steps: int) -> None:
        """Copy into place."""
        self.put(name, weight)
        device = self.optimization.trained[name].device
        self.optimization.set_moments(name, {key: value.to(device) for key, value in moments.items()}, steps)

    def loaded(self) -> None:
        """The bfloat16 weights anew."""
        if self.masters is not None:
            self.masters.publish()


class Masters:
    """Float32 weights behind a model in bfloat16.

    A gradient moves into the float32 one of its master as soon as it is complete: micro-batches add up in float32,
    and the bfloat16 gradients are never all there at once.
    """

    def __init__(self, scorer: Scorer, trained: Mapping[str, nn.Parameter]) -> None:
        self.weights = {name: nn.Parameter(one.detach().clone()) for name, one in trained.items()}
        self._low: list[Tensor] = list(trained.values())
        self._high: list[Tensor] = list(self.weights.values())
        use_bfloat16(scorer)
        for low, master in zip(self._low, self.weights.values(), strict=True):
            low.register_post_accumulate_grad_hook(_moves_gradient_to(master))

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model."""
        torch._foreach_copy_(self._low, self._high)


def _moves_gradient_to(master: nn.Parameter) -> Any:
    def move(low: Tensor) -> None:
        assert low.grad is not None
        if master.grad is None:
            master.grad = low.grad.float()
        else:
            master.grad.add_(low.grad)
        low.grad = None

    return move


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(one.nbytes for one in [*bucket, tensor]) > _BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
