"""Rotary position embeddings in fewer passes over memory than autograd's.

Su et al., arXiv:2104.09864, in the half-split layout of transformers: with x = (x1, x2) along the head, and cosines
and sines likewise, y1 = x1 cos1 - x2 sin1 and y2 = x2 cos2 + x1 sin2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_NAME = "apply_rotary_pos_emb"
_TOLERANCE = 1e-5


class _Rotation(torch.autograd.Function):
    """Linear in x, so nothing but the angles is kept: dx1 = g1 cos1 + g2 sin2, dx2 = g2 cos2 - g1 sin1."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(states, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        first, second = _halves(grad)
        sin_first, sin_second = _halves(sin)
        turned = grad * cos
        turned_first, turned_second = _halves(turned)
        turned_first.addcmul_(second, sin_second)
        turned_second.addcmul_(first, sin_first, value=-1)
        return turned, None, None


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula above."""
    first, second = _halves(states)
    sin_first, sin_second = _halves(sin)
    turned = states * cos
    turned_first, turned_second = _halves(turned)
    turned_first.addcmul_(second, sin_first, value=-1)
    turned_second.addcmul_(first, sin_second)
    return turned


def _halves(states: Tensor) -> tuple[Tensor, Tensor]:
    first, second = states.chunk(2, -1)
    return first, second


class _Apply:
    """Stands for a modelling file's function: (query, key, cos, sin) -> (query, key), rotated."""

    def __init__(self, plain: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.plain = plain

    def __call__(
        self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        ours = query.dtype == key.dtype == cos.dtype == sin.dtype
        ours = ours and (query.is_cuda or (query.device.type == "cpu" and query.dtype == torch.float32))
        # angles for a part of the head: what becomes of the rest is the model's own affair
        whole = query.shape[-1] == key.shape[-1] == cos.shape[-1]
        if not (ours and whole) or cos.requires_grad:
            return self.plain(query, key, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return rotated(states, cos, sin)
    kept: Tensor = _Rotation.apply(states, cos, sin)
    return kept


def install(model: nn.Module) -> None:
    """Replace the function in the modelling file of every attention that has one of this very formula."""
    for file in {type(module).__module__ for module in model.modules()}:
        plain = getattr(sys.modules[file], _NAME, None)
        if plain is not None and not isinstance(plain, _Apply) and _is_right(plain):
            setattr(sys.modules[file], _NAME, _Apply(plain))


def _is_right(plain: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    draws = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 3, 8, generator=draws) for heads in (2, 1))
    cos, sin = torch.randn(2, 1, 3, 8, generator=draws)
    try:
        theirs = plain(query, key, cos, sin)
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments, or rotates a part of the head only
        return False
    ours = _Apply(plain)(query, key, cos, sin)
    pairs = zip(ours, theirs, strict=True)
    return all(one.shape == two.shape and bool((one - two).abs().max() < _TOLERANCE) for one, two in pairs)
