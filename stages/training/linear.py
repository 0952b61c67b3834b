"""Linear layers whose products go to the faster of the CPU's two libraries (see `stages.losses.products`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stages.losses.products import linear, packed, prefers_onednn, product


class _Linear(torch.autograd.Function):
    """y = x W^T + b over the last dimension."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        # a frozen weight's gradient needs no input: with adapters most inputs need not stay
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(hidden if needs_weight else None, weight_OI if needs_hidden else None)
        return linear(hidden, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_OI = ctx.saved_tensors
        grad_RO, kind = grad.reshape(-1, grad.shape[-1]), grad.dtype
        return (
            None if weight_OI is None else product(grad_RO, weight_OI, kind).view(*grad.shape[:-1], weight_OI.shape[1]),
            None if hidden is None else product(grad_RO.t(), hidden.reshape(-1, hidden.shape[-1]), kind),
            grad_RO.sum(0) if ctx.needs_input_grad[2] else None,
        )


class _Frozen(torch.autograd.Function):
    """y = x W^T + b of a frozen weight that nothing keeps: it is made for a product, and again for its way back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_of: Callable[[torch.dtype], Tensor], bias_O: Tensor | None) -> Tensor:
        ctx.weight_of = weight_of
        weight_OI = weight_of(hidden.dtype)
        multiply = linear if _goes_to_onednn(hidden, weight_OI) else nn.functional.linear
        return multiply(hidden, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI = ctx.weight_of(grad.dtype)
        grad_RO = grad.reshape(-1, grad.shape[-1])
        return product(grad_RO, weight_OI, grad.dtype).view(*grad.shape[:-1], weight_OI.shape[1]), None, None


def frozen(hidden: Tensor, weight_of: Callable[[torch.dtype], Tensor], bias_O: Tensor | None) -> Tensor:
    """[..., O] hidden [..., I] W^T + bias, where `weight_of` makes the weight W [O, I] in a type. Neither it nor the
    bias is trained."""
    result: Tensor = _Frozen.apply(hidden, weight_of, bias_O)
    return result


_rows: ContextVar[int | None] = ContextVar("rows", default=None)


@contextmanager
def chosen_for(rows: int) -> Iterator[None]:
    """Inside, the library is the one for so many rows, whatever a pass has: so a row's product is the same bits in any
    company. (oneDNN and MKL compute a row in one way from 4 rows on, in multiples of 4.)"""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def _goes_to_onednn(hidden: Tensor, weight_OI: Tensor) -> bool:
    rows = _rows.get()
    work = hidden.numel() * weight_OI.shape[0] if rows is None else rows * weight_OI.numel()
    return prefers_onednn(hidden, weight_OI, work) and not torch.is_autocast_enabled("cpu")


class _Forward:
    """Stands for the `forward` of a linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.plain_forward = layer, layer.forward
        self.packed_OI: Tensor | None = None
        """The weight, while `packed_weights` holds it."""

    def __call__(self, hidden: Tensor) -> Tensor:
        weight_OI, bias_O = self.layer.weight, self.layer.bias
        if not _goes_to_onednn(hidden, weight_OI):
            return self.plain_forward(hidden)
        if not torch.is_grad_enabled():
            return linear(hidden, weight_OI if self.packed_OI is None else self.packed_OI, bias_O)
        result: Tensor = _Linear.apply(hidden, weight_OI, bias_O)
        return result


def install(model: nn.Module) -> None:
    """Replace the forward pass of every plain linear layer; once, however often it is called."""
    for layer in model.modules():
        if type(layer) is nn.Linear and "forward" not in vars(layer):
            layer.forward = _Forward(layer)  # type: ignore[assignment]


@contextmanager
def packed_weights(model: nn.Module, *, rows: int, most_bytes: int) -> Iterator[None]:
    """Inside, passes without a gradient multiply by packed copies of the weights (see `stages.losses.products.packed`),
    of `most_bytes` at most: the same bits sooner, in passes of about so many rows. No weight may change inside."""
    forwards = [found for layer in model.modules() if isinstance(found := vars(layer).get("forward"), _Forward)]
    room = most_bytes
    try:
        for forward in forwards:
            weight_OI = forward.layer.weight
            if weight_OI.nbytes <= room and prefers_onednn(weight_OI, weight_OI, rows * weight_OI.numel()):
                forward.packed_OI = packed(weight_OI, rows)
                room -= weight_OI.nbytes
        yield
    finally:
        for forward in forwards:
            forward.packed_OI = None
