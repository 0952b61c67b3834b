"""Log-probabilities of given tokens from hidden states, without ever holding all logits.

N positions, H hidden size, V vocabulary. Logits exist for one chunk of positions at a time, forward and
backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 16 * 2**20
"""Size of one chunk of float32 logits. Measured on CPU: 64 MiB take half as long again, being fresh memory from the
system each time and too large for the cache; 8 MiB read the weight too often."""

LEAST_TOKENS = {"cpu": 64, "cuda": 1024}
"""Least positions of a chunk: fewer would take longer to read the weight than to multiply by it."""


def chunk_length(vocabulary: int, device: torch.device) -> int:
    """Positions in a chunk."""
    return max(LEAST_TOKENS.get(device.type, LEAST_TOKENS["cuda"]), CHUNK_BYTES // (4 * vocabulary))


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


class TokenScores(NamedTuple):
    """What is known of every target token."""

    logprobs_N: Tensor
    entropy_N: Tensor
    """In nats; no gradient."""
    is_likeliest_N: Tensor
    """bool: no token has a higher probability."""


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
) -> TokenScores:
    """Log-probability of each target, entropy of its distribution, and whether it is the likeliest token.

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
    return TokenScores(*_LinearLogprobs.apply(hidden_NH, weight_VH, bias_V, targets_N, head, chunk))


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
    ) -> tuple[Tensor, Tensor, Tensor]:
        positions = hidden_NH.shape[0]
        wide = torch.promote_types(weight_VH.dtype, torch.float32)
        logprobs_N, entropy_N, normalizers_N = hidden_NH.new_empty(3, positions, dtype=wide).unbind(0)
        is_likeliest_N = torch.empty(positions, dtype=torch.bool, device=hidden_NH.device)
        room = _room(head, min(chunk, positions), 2)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for start in range(0, positions, chunk):
                part = slice(start, start + chunk)
                logits_CV, weights_CV = (memory[: len(targets_N[part])] for memory in room)
                _write_logits(head, hidden_NH[part], logits_CV)
                highest_C = logits_CV.amax(1)
                logits_CV.sub_(highest_C[:, None])
                torch.exp(logits_CV, out=weights_CV)
                sums_C = weights_CV.sum(1)
                targets_C = logits_CV.gather(1, targets_N[part, None])[:, 0]
                logprobs_N[part] = targets_C - sums_C.log()
                is_likeliest_N[part] = targets_C == 0
                entropy_N[part] = sums_C.log() - torch.linalg.vecdot(weights_CV, logits_CV) / sums_C
                normalizers_N[part] = highest_C + sums_C.log()
        ctx.save_for_backward(hidden_NH, targets_N, normalizers_N)
        ctx.head, ctx.chunk = head, chunk
        ctx.mark_non_differentiable(entropy_N, is_likeliest_N)
        return logprobs_N, entropy_N, is_likeliest_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, targets_N, normalizers_N = ctx.saved_tensors
        head: Head = ctx.head
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide = normalizers_N.dtype
        grad_hidden_NH = torch.zeros_like(hidden_NH) if wants_hidden else None
        grad_weight_VH = torch.zeros_like(head.weight_VH, dtype=wide) if wants_weight else None
        grad_bias_V = head.weight_VH.new_zeros(head.weight_VH.shape[0], dtype=wide) if wants_bias else None
        room = _room(head, min(ctx.chunk, hidden_NH.shape[0]), 1 if head.softcap is None else 2)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for start in range(0, hidden_NH.shape[0], ctx.chunk):
                part = slice(start, start + ctx.chunk)
                hidden_CH = hidden_NH[part].to(head.weight_VH.dtype)
                logits_CV = room[0][: len(hidden_CH)]
                _write_logits(head, hidden_CH, logits_CV)
                slope_CV = _softcap_slope(head, logits_CV, room[-1][: len(hidden_CH)])
                grad_CV = logits_CV.sub_(normalizers_N[part, None]).exp_().mul_(-grad_N[part, None])
                grad_CV.scatter_add_(1, targets_N[part, None], grad_N[part, None])
                if slope_CV is not None:
                    grad_CV.mul_(slope_CV)
                if head.scale != head.temperature:
                    grad_CV.mul_(head.scale / head.temperature)
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


def _room(head: Head, positions: int, chunks: int) -> list[Tensor]:
    """[positions, V] each: taken once, because the system needs as long to give fresh memory as to fill it."""
    wide = torch.promote_types(head.weight_VH.dtype, torch.float32)
    return [head.weight_VH.new_empty(positions, head.weight_VH.shape[0], dtype=wide) for _ in range(chunks)]


def _write_logits(head: Head, hidden_CH: Tensor, logits_CV: Tensor) -> None:
    """`Head.logits` into given memory."""
    hidden_CH = hidden_CH.to(head.weight_VH.dtype)
    if logits_CV.dtype == head.weight_VH.dtype:
        torch.mm(hidden_CH, head.weight_VH.t(), out=logits_CV)
    else:
        logits_CV.copy_(hidden_CH @ head.weight_VH.t())
    if head.bias_V is not None:
        logits_CV.add_(head.bias_V)
    if head.scale != 1.0:
        logits_CV.mul_(head.scale)
    if head.softcap is not None:
        logits_CV.div_(head.softcap).tanh_().mul_(head.softcap)
    if head.temperature != 1.0:
        logits_CV.div_(head.temperature)


def _softcap_slope(head: Head, logits_CV: Tensor, room_CV: Tensor) -> Tensor | None:
    """Derivative of the softcap, 1 - tanh^2, in the given memory; the tanh is logits * temperature / softcap."""
    if head.softcap is None:
        return None
    return torch.mul(logits_CV, head.temperature / head.softcap, out=room_CV).square_().neg_().add_(1.0)


def _add_product(total_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """total += grad^T hidden, in the type of `total`."""
    if total_VH.dtype == grad_CV.dtype:
        total_VH.addmm_(grad_CV.t(), hidden_CH)
    else:
        total_VH.add_(grad_CV.t() @ hidden_CH)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
