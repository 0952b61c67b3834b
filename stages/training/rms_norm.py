"""Root-mean-square norms in fewer passes over memory than autograd's: torch's kernel on a GPU, and our formula in
float32 on a CPU.

Zhang and Sennrich, arXiv:1910.07467: y = w x / sqrt(mean(x^2) + eps). R rows, H features.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm

_TOLERANCE = 1e-5


class _RMSNorm(torch.autograd.Function):
    """dx = s (g w - x s^2 mean(g w x)) and dw = sum over rows of g x s, with s = 1 / sqrt(mean(x^2) + eps)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        out, scales = normalized(hidden, weight_H, epsilon)
        ctx.save_for_backward(hidden, weight_H, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_H, scales = ctx.saved_tensors
        products_RH = (grad * hidden).reshape(-1, hidden.shape[-1])
        grad_weight_H = scales.reshape(-1) @ products_RH if ctx.needs_input_grad[1] else None
        means = (products_RH @ weight_H).reshape(scales.shape).mul_(scales.pow(3)).div_(-hidden.shape[-1])
        grad_hidden = torch.mul(grad, weight_H).mul_(scales).addcmul_(hidden, means)
        return grad_hidden, grad_weight_H, None


def normalized(hidden: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(w x s, s) with s = 1 / sqrt(mean(x^2) + eps)."""
    norms = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    scales = norms.square_().div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
    return (hidden * scales).mul_(weight_H), scales


class _Forward:
    """Stands for the `forward` of a norm."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm, self.plain_forward = norm, norm.forward

    def __call__(self, hidden: Tensor) -> Tensor:
        norm: Any = self.norm
        if hidden.is_cuda and hidden.dtype == norm.weight.dtype:
            kernel: Tensor = rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
            return kernel
        if hidden.device.type != "cpu" or hidden.dtype != norm.weight.dtype or hidden.dtype != torch.float32:
            plain: Tensor = self.plain_forward(hidden)
            return plain
        if not torch.is_grad_enabled():
            return normalized(hidden, norm.weight, norm.variance_epsilon)[0]
        fused: Tensor = _RMSNorm.apply(hidden, norm.weight, norm.variance_epsilon)
        return fused


def install(model: nn.Module) -> None:
    """Replace the forward pass of every norm that computes this very formula: of a kind, one is tried."""
    right: dict[type, bool] = {}
    for norm in model.modules():
        if isinstance(getattr(norm, "variance_epsilon", None), float) and "forward" not in vars(norm):
            if type(norm) not in right:
                right[type(norm)] = _is_right(norm)
            if right[type(norm)]:
                norm.forward = _Forward(norm)


def _is_right(norm: Any) -> bool:
    if len(signature(norm.forward).parameters) != 1:  # with a gate it is another formula
        return False
    if norm.weight.ndim != 1 or norm.weight.device.type != "cpu" or norm.weight.dtype != torch.float32:
        return False
    with torch.no_grad():
        row_H = torch.linspace(-3, 5, len(norm.weight))[None]
        plain = norm(row_H)
        return bool((plain - _Forward(norm)(row_H)).abs().max() <= _TOLERANCE * plain.abs().max())
