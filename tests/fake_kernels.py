"""Kernels that torch has for CUDA alone, by their definition, for tensors of the CPU: attention for rows of different
lengths, and products of bfloat16 in float32."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_ALIGNED = 32
"""The float32 kernel's normalizers have room for a multiple of so many queries."""


def flash_forward(  # noqa: PLR0913 - the signature is torch's
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    dropout: float,
    causal: bool,
    debug: bool,
    **rest: Any,
) -> tuple[Tensor, ...]:
    """([R, h, d], normalizers [h, R], what nobody reads)."""
    window = rest.get("window_size_left", -1)
    out, sums_hR = torch.empty_like(query), torch.empty(query.shape[1], query.shape[0])
    for q, k in _sequences(starts_q, starts_k):
        scores_hQK = _scores(query[q], key[k], rest["scale"], causal, window)
        sums_hR[:, q] = scores_hQK.logsumexp(-1)
        out[q] = _mixed(scores_hQK.softmax(-1), value[k]).to(out.dtype)
    nothing = torch.empty(0)
    return out, sums_hR, nothing, nothing, nothing


def flash_backward(  # noqa: PLR0913 - the signature is torch's
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums_hR: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    dropout: float,
    causal: bool,
    seed: Tensor,
    offset: Tensor,
    **rest: Any,
) -> tuple[Tensor, ...]:
    """Gradients of the three, with output and normalizers of all keys together."""
    window = rest.get("window_size_left", -1)
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    repeats = query.shape[1] // key.shape[1]
    for q, k in _sequences(starts_q, starts_k):
        weights_hQK = (_scores(query[q], key[k], rest["scale"], causal, window) - sums_hR[:, q, None]).exp()
        toward_hQd, own_hQd = (one[q].float().transpose(0, 1) for one in (grad, out))
        value_hKd = value[k].float().transpose(0, 1).repeat_interleave(repeats, 0)
        key_hKd = key[k].float().transpose(0, 1).repeat_interleave(repeats, 0)
        through_hQK = toward_hQd @ value_hKd.mT - (toward_hQd * own_hQd).sum(-1, keepdim=True)
        through_hQK = through_hQK * weights_hQK * rest["scale"]
        grads[0][q] = (through_hQK @ key_hKd).transpose(0, 1).to(query.dtype)
        of_keys = through_hQK.mT @ query[q].float().transpose(0, 1), weights_hQK.mT @ toward_hQd
        for total, one_hKd in zip(grads[1:], of_keys, strict=True):
            total[k] = one_hKd.transpose(0, 1).unflatten(1, (key.shape[1], repeats)).sum(2).to(key.dtype)
    return grads


def efficient_forward(  # noqa: PLR0913 - the signature is torch's
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    dropout: float,
    mask: int,
    sums: bool,
    **rest: Any,
) -> tuple[Any, ...]:
    """([1, R, h, d], normalizers [n, h, padded], what nobody reads)."""
    lengths = starts_q, starts_k, longest_q, longest_k
    out, sums_hR, *nothing = flash_forward(query[0], key[0], value[0], *lengths, 0.0, mask != 0, False, **rest)
    room = -(-longest_q // _ALIGNED) * _ALIGNED
    sums_nhL = torch.full((len(starts_q) - 1, query.shape[2], room), torch.inf)
    for number, (q, _) in enumerate(_sequences(starts_q, starts_k)):
        sums_nhL[number, :, : q.stop - q.start] = sums_hR[:, q]
    return out[None], sums_nhL, nothing[0], nothing[0], longest_q, longest_k


def efficient_backward(  # noqa: PLR0913 - the signature is torch's
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    out: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    sums_nhL: Tensor,
    dropout: float,
    seed: Tensor,
    offset: Tensor,
    mask: int,
    bias_grad: bool,
    **rest: Any,
) -> tuple[Tensor, ...]:
    """Gradients of the three, and of no bias."""
    parts = [sums_nhL[n, :, : q.stop - q.start] for n, (q, _) in enumerate(_sequences(starts_q, starts_k))]
    states = grad[0], query[0], key[0], value[0], out[0], torch.cat(parts, 1)
    lengths = starts_q, starts_k, longest_q, longest_k
    grads = flash_backward(*states, *lengths, 0.0, mask != 0, seed, offset, **rest)
    return *(one[None] for one in grads), torch.empty(0)


def _sequences(starts_q: Tensor, starts_k: Tensor) -> Iterator[tuple[slice, slice]]:
    bounds = [list(pairwise(one.tolist())) for one in (starts_q, starts_k)]
    return ((slice(*q), slice(*k)) for q, k in zip(*bounds, strict=True))


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool, window: int) -> Tensor:
    """[h, Q, K] in float32; the last query sees the last key."""
    query_hQd, key_hKd = query.float().transpose(0, 1), key.float().transpose(0, 1)
    scores_hQK = query_hQd @ key_hKd.repeat_interleave(len(query_hQd) // len(key_hKd), 0).mT * scale
    queries, keys = scores_hQK.shape[1:]
    distance_QK = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)
    hidden_QK = (distance_QK < 0) & causal
    if window >= 0:
        hidden_QK |= distance_QK > window
    return scores_hQK.masked_fill(hidden_QK, -torch.inf)


def _mixed(weights_hQK: Tensor, value: Tensor) -> Tensor:
    value_hKd = value.float().transpose(0, 1)
    return (weights_hQK @ value_hKd.repeat_interleave(len(weights_hQK) // len(value_hKd), 0)).transpose(0, 1)


def wide_product(left: Tensor, right: Tensor, kind: torch.dtype) -> Tensor:
    """left right in another type than theirs, which is float32."""
    _check_kinds(left, kind)
    return left.float() @ right.float()


def added_wide_product(total: Tensor, left: Tensor, right: Tensor, kind: torch.dtype, **factors: float) -> Tensor:
    """total + left right, as `wide_product`."""
    _check_kinds(left, kind)
    return torch.addmm(total.float(), left.float(), right.float(), **factors)


def added_in_place(
    total: Tensor, left: Tensor, right: Tensor, kind: torch.dtype, *, out: Tensor, **factors: float
) -> Tensor:
    """The same, written there."""
    return out.copy_(added_wide_product(total, left, right, kind, **factors))


def _check_kinds(given: Tensor, kind: torch.dtype) -> None:
    if given.dtype not in (torch.bfloat16, torch.float16) or kind != torch.float32:
        raise RuntimeError(f"CUDA has no product of {given.dtype} in {kind}")


def histogram(values: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """Of whole numbers too, which the CPU's does not take."""
    return torch.histc(values.float(), bins, min, max).to(values.dtype)


KERNELS = {
    "aten::histc.default": histogram,
    "aten::mm.dtype": wide_product,
    "aten::addmm.dtype": added_wide_product,
    "aten::addmm.dtype_out": added_in_place,
    "aten::_flash_attention_forward.default": flash_forward,
    "aten::_flash_attention_backward.default": flash_backward,
    "aten::_efficient_attention_forward.default": efficient_forward,
    "aten::_efficient_attention_backward.default": efficient_backward,
}
