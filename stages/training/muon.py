"""Muon: the momentum of a matrix, made orthogonal (K. Jordan et al., 2024, kellerjordan.github.io/posts/muon), at the
size that AdamW's updates have (Liu et al., arXiv:2502.16982, section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from stages.training.processes import Processes

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial that a step of Newton and Schulz takes of every singular value."""
_STEPS = 5
_LEAST_NORM = 1e-7
_RMS_OF_ADAMW = 0.2


def orthogonalized(matrices: Tensor) -> Tensor:
    """[m, n] or [experts, m, n] U S V^T -> U p(S / |S|) V^T of the same shape: singular values between about 0.7 and
    1.2, but for tiny ones."""
    wide = matrices.size(-2) <= matrices.size(-1)
    turned = matrices if wide else matrices.mT
    out = turned / turned.norm(dim=(-2, -1), keepdim=True).clamp(min=_LEAST_NORM)
    first, third, fifth = _COEFFICIENTS
    added = torch.addmm if matrices.ndim == 2 else torch.baddbmm
    for _ in range(_STEPS):
        gram = out @ out.mT
        inner = added(gram, gram, gram, beta=third, alpha=fifth)
        out = added(out, inner, out, beta=first)
    turned_back: Tensor = out if wide else out.mT
    return turned_back


class Muon(torch.optim.Optimizer):
    """Over matrices [m, n], or stacks of them [experts, m, n]; whole ones, or slices of FSDP2's.

    Several processes share the matrices out: each makes its own orthogonal and sends them to the others. `number`: the
    type that this is computed in.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, momentum: float, processes: Processes, number: torch.dtype
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.momentum, self.processes, self.number = momentum, processes, number

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Collective where there are several processes."""
        for group in self.param_groups:
            parameters = [one for one in group["params"] if one.grad is not None]
            for some in _batches(parameters, self.processes.size):
                for parameter, direction in zip(some, self._directions(some), strict=True):
                    size = _RMS_OF_ADAMW * math.sqrt(max(parameter.shape[-2:]))
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(_like(parameter, direction), alpha=-group["lr"] * size)

    def _directions(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """At most one for each process to compute."""
        whole = [self._look_ahead(parameter).to(self.number) for parameter in parameters]
        if self.processes.size == 1:
            return [orthogonalized(one) for one in whole]
        own = self.processes.rank
        sent = [orthogonalized(one).contiguous() if rank == own else one for rank, one in enumerate(whole)]
        for rank, one in enumerate(sent):
            dist.broadcast(one, src=rank)
        return sent

    def _look_ahead(self, parameter: Tensor) -> Tensor:
        """Nesterov's: the gradient, and the mean of those before, once more moved by it."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        mean = state["momentum"].lerp_(gradient, 1 - self.momentum)
        ahead = gradient.lerp(mean, self.momentum)
        return ahead.full_tensor() if isinstance(ahead, DTensor) else ahead


def _batches(parameters: Sequence[Tensor], size: int) -> Iterator[Sequence[Tensor]]:
    """Matrices of about equal size together, for processes that wait for one another."""
    ordered = sorted(parameters, key=lambda one: -one.numel())
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _like(parameter: Tensor, whole: Tensor) -> Tensor:
    whole = whole.to(parameter.dtype)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
