"""Log-probabilities of given tokens from hidden states, without ever holding all logits.

N positions, H hidden size, V vocabulary. Logits exist for one chunk of positions at a time, forward and
backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk of float32 logits: smaller ones read the weight more often, larger ones cost memory."""

CUDA_CHUNK_TOKENS = 1024
"""Least positions of a chunk on a GPU, where fewer would take longer to read the weight than to multiply."""


def chunk_length(vocabulary: int, device: torch.device) -> int:
    """Positions in a chunk."""
    positions = max(1, CHUNK_BYTES // (4 * vocabulary))
    return max(positions, CUDA_CHUNK_TOKENS) if device.type == "cuda" else positions


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

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V], float32 or the weight's type where that is wider. A plain differentiable expression."""
        weight_VH, bias_V = self.weight_VH, self.bias_V
        logits_NV = _wide(hidden_NH.to(weight_VH.dtype) @ weight_VH.t())
        if bias_V is not None:
            logits_NV = logits_NV + bias_V
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV if self.temperature == 1.0 else logits_NV / self.temperature


def linear_logprobs(  # noqa: PLR0913 - a head is this many things
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, [N], and entropy of its distribution, [N] without gradient.

    log_softmax(z)[n, target_n] with z as in `Head`. Exact gradients for hidden states, weight and bias,
    whichever need one: the backward pass computes each chunk's logits again. Sums run in float32 (float64 for
    float64 weights). Hidden states of another type than the weight are cast to the weight's type; autocast
    does not apply inside.
    """
    if hidden_NH.shape[0] != targets_N.shape[0] or hidden_NH.shape[1] != weight_VH.shape[1]:
        shapes = [tuple(tensor.shape) for tensor in (hidden_NH, weight_VH, targets_N)]
        raise ValueError(f"hidden states [N, H], weight [V, H] and targets [N] do not fit: found {shapes}")
    head = Head(weight_VH.detach(), None if bias_V is None else bias_V.detach(), scale, softcap, temperature)
    chunk = chunk_tokens or chunk_length(weight_VH.shape[0], weight_VH.device)
    logprobs_N, entropy_N = _LinearLogprobs.apply(hidden_NH, weight_VH, bias_V, targets_N, head, chunk)
    return logprobs_N, entropy_N


class _LinearLogprobs(torch.autograd.Function):
    """d logprob / d logit_v = [v = target] - p_v, then back through temperature, softcap, scale, product."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        head: Head,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        positions = hidden_NH.shape[0]
        wide = torch.promote_types(weight_VH.dtype, torch.float32)
        logprobs_N, entropy_N, normalizers_N = hidden_NH.new_empty(3, positions, dtype=wide).unbind(0)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for start in range(0, positions, chunk):
                part = slice(start, start + chunk)
                logits_CV = head.logits(hidden_NH[part])
                targets_CV = logits_CV.gather(1, targets_N[part, None])[:, 0]
                highest_C = logits_CV.amax(1)
                weights_CV = (logits_CV - highest_C[:, None]).exp_()
                sums_C = weights_CV.sum(1)
                normalizers_N[part] = highest_C + sums_C.log()
                logprobs_N[part] = targets_CV - normalizers_N[part]
                expected_C = torch.linalg.vecdot(weights_CV, logits_CV) / sums_C
                entropy_N[part] = normalizers_N[part] - expected_C
        ctx.save_for_backward(hidden_NH, targets_N, normalizers_N)
        ctx.head, ctx.chunk = head, chunk
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, targets_N, normalizers_N = ctx.saved_tensors
        head: Head = ctx.head
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide = normalizers_N.dtype
        grad_hidden_NH = torch.zeros_like(hidden_NH) if wants_hidden else None
        grad_weight_VH = torch.zeros_like(head.weight_VH, dtype=wide) if wants_weight else None
        grad_bias_V = head.weight_VH.new_zeros(head.weight_VH.shape[0], dtype=wide) if wants_bias else None
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for start in range(0, hidden_NH.shape[0], ctx.chunk):
                part = slice(start, start + ctx.chunk)
                hidden_CH = hidden_NH[part].to(head.weight_VH.dtype)
                logits_CV = head.logits(hidden_CH)
                grad_CV = _grad_product(head, logits_CV, targets_N[part], normalizers_N[part], grad_N[part])
                if grad_bias_V is not None:
                    grad_bias_V += grad_CV.sum(0)
                grad_CV = grad_CV.to(head.weight_VH.dtype)
                if grad_hidden_NH is not None:
                    grad_hidden_NH[part] = grad_CV @ head.weight_VH
                if grad_weight_VH is not None:
                    _add_product(grad_weight_VH, grad_CV, hidden_CH)
        return (
            grad_hidden_NH,
            None if grad_weight_VH is None else grad_weight_VH.to(head.weight_VH.dtype),
            None if grad_bias_V is None or head.bias_V is None else grad_bias_V.to(head.bias_V.dtype),
            None,
            None,
            None,
        )


def _grad_product(head: Head, logits_CV: Tensor, targets_C: Tensor, normalizers_C: Tensor, grad_C: Tensor) -> Tensor:
    """Gradient of sum(grad * logprob) with respect to h W^T + b. [C, V]."""
    grad_CV = (logits_CV - normalizers_C[:, None]).exp_().mul_(-grad_C[:, None])
    grad_CV.scatter_add_(1, targets_C[:, None], grad_C[:, None])
    if head.softcap is not None:
        # logits * temperature / softcap is the tanh, whose derivative is 1 - tanh^2
        grad_CV.mul_(1 - (logits_CV * (head.temperature / head.softcap)).square())
    return grad_CV.mul_(head.scale / head.temperature)


def _add_product(total_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """total += grad^T hidden, in the type of `total`."""
    if total_VH.dtype == grad_CV.dtype:
        total_VH.addmm_(grad_CV.t(), hidden_CH)
    else:
        total_VH.add_(grad_CV.t() @ hidden_CH)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
