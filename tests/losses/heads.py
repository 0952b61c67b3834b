"""Heads of every kind with small inputs, and what an operation multiplied and allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stages.losses.head import Head

N, H, V = 7, 4, 9


def inputs(
    positions: int = N, hidden: int = H, vocabulary: int = V, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias that want a gradient, and targets."""
    draws = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=dtype).requires_grad_()

    made = make(positions, hidden), make(vocabulary, hidden), make(vocabulary)
    return *made, torch.randint(0, vocabulary, (positions,), generator=draws)


def kinds() -> Iterator[dict[str, Any]]:
    """Every combination of bias, softcap, scale and temperature."""
    for bias, softcap, scale, temperature in product((False, True), (None, 1.5), (1.0, 0.3), (1.0, 0.7)):
        yield {"bias": bias, "softcap": softcap, "scale": scale, "temperature": temperature}


def make_head(weight: Tensor, bias: Tensor, kind: dict[str, Any]) -> Head:
    settings = dict(kind)
    return Head(weight, bias if settings.pop("bias") else None, **settings)


def trained(hidden: Tensor, head: Head) -> list[Tensor]:
    """What has a gradient."""
    return [tensor for tensor in (hidden, head.weight_VH, head.bias_V) if tensor is not None and tensor.requires_grad]


def frozen(head: Head) -> Head:
    bias = None if head.bias_V is None else head.bias_V.detach()
    return replace(head, weight_VH=head.weight_VH.detach(), bias_V=bias)


def log_softmax(hidden: Tensor, head: Head) -> Tensor:
    """The same distribution, written out."""
    logits = (hidden @ head.weight_VH.t() + (0 if head.bias_V is None else head.bias_V)) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits / head.temperature, -1)


def entropy(logs: Tensor) -> Tensor:
    return -(logs.exp() * logs).sum(-1)


@dataclass
class Work(TorchDispatchMode):
    """Multiplications inside matrix products, and the most elements that any operation gave back."""

    only: int | None = None
    """Count products with this many rows or columns on a side; None: all."""
    multiplications: int = 0
    largest: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = [value for value in args if isinstance(value, Tensor)][-2:]
            sides = left.shape[0], left.shape[1], right.shape[1]
            if self.only is None or self.only in sides:
                self.multiplications += math.prod(sides)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result

    def products(self, positions: int, vocabulary: int, hidden: int) -> float:
        """In units of one product of [positions, vocabulary] with `hidden`."""
        return self.multiplications / (positions * vocabulary * hidden)
