"""The language-modelling head, one chunk of positions after another: logits, and the way back from them.

N positions, C positions of a chunk, H hidden size, V vocabulary. The logits of all N positions never exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.losses.products import product

if TYPE_CHECKING:
    from stages.losses.head_gradient import GradientTotal

CHUNK_BYTES = 32 * 2**20
"""Size of a chunk of logits. Measured on CPU: more gains nothing."""

LEAST_TOKENS = {"cpu": 128, "cuda": 1024}
"""Least positions of a chunk: with fewer, reading the weight and adding up its gradient takes longer than the
products."""


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: softcap * tanh(scale (h W^T + b) / softcap) / temperature.

    Softcap as in Gemma 2, scale as in Cohere (`logit_scale`) and Granite (1 / `logits_scaling`).
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    total: GradientTotal | None = None
    """Where the weight's gradient is added up; None: it is returned to autograd."""

    @property
    def form(self) -> Callable[[Tensor, Tensor | None], Head]:
        """(weight, bias) -> this head with them. It holds no weight: a sharded one is given back after its use."""
        return partial(Head, scale=self.scale, softcap=self.softcap, temperature=self.temperature, total=self.total)

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight_VH.shape[0]

    @property
    def sum_type(self) -> torch.dtype:
        """What everything but the products is computed in: float32, or the weight's type where that is wider."""
        return torch.promote_types(self.weight_VH.dtype, torch.float32)

    @property
    def product_type(self) -> torch.dtype:
        """What products are given: the weight's type, widened on a CPU, which would round their sums to it."""
        return self.sum_type if self.weight_VH.device.type == "cpu" else self.weight_VH.dtype

    @property
    def slope(self) -> float:
        """d logit / d (h W^T + b), but for the softcap's 1 - tanh^2."""
        return self.scale / self.temperature

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V] in the `sum_type`. A plain differentiable expression."""
        logits_NV = (hidden_NH.to(self.weight_VH.dtype) @ self.weight_VH.t()).to(self.sum_type)
        if self.bias_V is not None:
            logits_NV = logits_NV + self.bias_V
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV if self.temperature == 1.0 else logits_NV / self.temperature

    def detached(self) -> Head:
        """The same numbers without a gradient."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VH=self.weight_VH.detach(), bias_V=bias_V)

    def first(self, vocabulary: int) -> Head:
        """Over the first tokens alone, where there are more; a gradient goes through autograd then."""
        if vocabulary >= self.vocabulary:
            return self
        bias_V = None if self.bias_V is None else self.bias_V[:vocabulary]
        return replace(self, weight_VH=self.weight_VH[:vocabulary], bias_V=bias_V, total=None)

    def to(self, device: torch.device) -> Head:
        """The same on another device, for one that is not trained."""
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return replace(self, weight_VH=self.weight_VH.to(device), bias_V=bias_V)

    def check(self, hidden_NH: Tensor, others_N: Tensor) -> None:
        """Raises ValueError when hidden states, weight and one value a position do not fit."""
        if hidden_NH.shape[0] != others_N.shape[0] or hidden_NH.shape[1] != self.weight_VH.shape[1]:
            shapes = [tuple(tensor.shape) for tensor in (hidden_NH, self.weight_VH, others_N)]
            raise ValueError(f"hidden states [N, H], weight [V, H] and targets [N] do not fit: found {shapes}")


def chunk_length(head: Head) -> int:
    """Most positions of a chunk: its logits are no larger than CHUNK_BYTES or, where that is more, than the weight."""
    least = min(LEAST_TOKENS.get(head.weight_VH.device.type, LEAST_TOKENS["cuda"]), head.weight_VH.shape[1])
    return max(1, least, CHUNK_BYTES // (head.sum_type.itemsize * head.vocabulary))


def parts_of(positions: int, longest: int) -> list[slice]:
    """Consecutive slices of about equal length, none longer than `longest`."""
    count = -(-positions // longest)
    bounds = [positions * i // count for i in range(count + 1)] if count else []
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def fixed_parts(positions: int, longest: int) -> list[slice]:
    """Consecutive slices of this length, and a last one with the rest."""
    return [slice(start, min(start + longest, positions)) for start in range(0, positions, longest)]


class ChunkedHead:
    """A head at work on one chunk after another. Sums are of the head's `sum_type`."""

    def __init__(self, head: Head, positions: int, longest: int) -> None:
        self.head = head.detached()
        # on a GPU of one length, for its host is slow at products of new shapes; on a CPU of about equal lengths
        fixed = head.weight_VH.is_cuda
        self.parts = fixed_parts(positions, longest) if fixed else parts_of(positions, longest)
        self.weight_VH = self.head.weight_VH.to(head.product_type)
        # what the product is multiplied by before a softcap, or altogether; it costs least on the hidden states
        self.factor = head.slope if head.softcap is None else head.scale / head.softcap
        self.bias_V = None if self.head.bias_V is None else self.head.bias_V.to(head.sum_type) * self.factor
        self.tanh_CV: Tensor | None = None

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """`Head.logits` of a chunk, the caller's to change."""
        head = self.head
        exact = self.weight_VH.dtype == head.sum_type
        hidden_CH = hidden_CH.to(self.weight_VH.dtype)
        scaled_CH = hidden_CH * self.factor if exact and self.factor != 1.0 else hidden_CH
        logits_CV = product(scaled_CH, self.weight_VH.t(), head.sum_type)
        if not exact and self.factor != 1.0:
            logits_CV.mul_(self.factor)
        if self.bias_V is not None:
            logits_CV.add_(self.bias_V)
        if head.softcap is not None:
            self.tanh_CV = logits_CV.tanh_()
            logits_CV = self.tanh_CV * (head.softcap / head.temperature)
        return logits_CV

    def mean_logits(self, weights_CV: Tensor) -> Tensor:
        """[C] sum_v weights logits of the chunk, for a head with a softcap, which leaves the logits' tanh behind."""
        assert self.tanh_CV is not None and self.head.softcap is not None
        sums_C: Tensor = torch.linalg.vecdot(weights_CV, self.tanh_CV)
        return sums_C * (self.head.softcap / self.head.temperature)

    def apply_softcap_slope(self, slopes_CV: Tensor) -> None:
        """Multiply by 1 - tanh^2, in place, where there is a softcap; once a chunk."""
        if self.tanh_CV is not None:
            slopes_CV.addcmul_(slopes_CV, self.tanh_CV.square_(), value=-1)

    def to_hidden(self, slopes_CV: Tensor) -> Tensor:
        """[C, H] slopes W, in the sum type."""
        return product(slopes_CV.to(self.weight_VH.dtype), self.weight_VH, self.head.sum_type)
