"""Attention over the parts of a plan with torch's fused CPU kernel, forward and backward.

A token's keys lie in several parts. Each part gives the softmax over its own keys with the logarithm of its
normalizer; parts are joined by their normalizers. The kernel's backward pass needs of the forward pass only the
output and the normalizer, and is exact for a part when it gets those of ALL parts: with p = exp(score - logsumexp)
and delta = sum(grad_out * out), d score = p (grad_out . value - delta) (arXiv:2205.14135, appendix B.4). So only
queries, keys, values, output and normalizers are kept, and no key is copied for its branches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.training.attention_plan import Block, Padded, Part

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class BlockAttention(torch.autograd.Function):
    """(query [1, h, T, d], key and value [1, k, T, d], parts, scale, is_whole) -> [1, T, h, d].

    `is_whole`: the parts have every token as a query. Where they have not, the output of the others is zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_1hTd: Tensor,
        key_1kTd: Tensor,
        value_1kTd: Tensor,
        parts: list[Part],
        scale: float,
        is_whole: bool = True,
    ) -> Tensor:
        _, heads, tokens, size = query_1hTd.shape
        shape = (1, tokens, heads, size)
        out_1Thd = query_1hTd.new_empty(shape) if is_whole else query_1hTd.new_zeros(shape)
        wide = torch.promote_types(query_1hTd.dtype, torch.float32)
        sums_Th = query_1hTd.new_empty(tokens, heads, dtype=wide)
        for part in parts:
            states = _take(query_1hTd, part, 0), _take(key_1kTd, part, 1), _take(value_1kTd, part, 1)
            result, sums = _forward(*states, 0.0, part.causal, attn_mask=_mask(part, query_1hTd), scale=scale)
            _join(out_1Thd[0], sums_Th, part, result, sums.to(wide))
        ctx.save_for_backward(query_1hTd, key_1kTd, value_1kTd, out_1Thd, sums_Th)
        ctx.parts, ctx.scale, ctx.is_whole = parts, scale, is_whole
        return out_1Thd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_1Thd: Tensor) -> tuple[Tensor | None, ...]:
        query_1hTd, key_1kTd, value_1kTd, out_1Thd, sums_Th = ctx.saved_tensors
        out_1hTd, grad_1hTd = out_1Thd.transpose(1, 2), grad_1Thd.transpose(1, 2)
        # the first parts of a whole plan hold every token once: as a query always, as a key unless a window cuts them
        once = ctx.is_whole and all(part.causal for part in ctx.parts if part.first)
        grads = [
            _room(states, written=ctx.is_whole if side == 0 else once)
            for side, states in enumerate((query_1hTd, key_1kTd, value_1kTd))
        ]
        for part in ctx.parts:
            # a padded query has no gradient and sees nothing, so it adds nothing to any key's
            grad_query, grad_key, grad_value = _backward(
                _take(grad_1hTd, part, 0, padding=0.0),
                _take(query_1hTd, part, 0),
                _take(key_1kTd, part, 1),
                _take(value_1kTd, part, 1),
                _take(out_1hTd, part, 0),
                _take(sums_Th.t()[None, ..., None], part, 0, padding=torch.inf)[..., 0],
                0.0,
                part.causal,
                attn_mask=_mask(part, query_1hTd),
                scale=ctx.scale,
            )
            for total, grad, side in zip(grads, (grad_query, grad_key, grad_value), (0, 1, 1), strict=True):
                _add(total, part, grad, side, write=part.first and (side == 0 or once))
        return (*grads, None, None, None)


def _room(states_1hTd: Tensor, *, written: bool) -> Tensor:
    """Room with the tokens outermost in memory, as the projections lay them out; zeros unless all is `written`."""
    _, heads, tokens, size = states_1hTd.shape
    shape = (1, tokens, heads, size)
    room_1Thd = states_1hTd.new_empty(shape) if written else states_1hTd.new_zeros(shape)
    return room_1Thd.transpose(1, 2)


def _take(states_1hTd: Tensor, part: Part, side: int, *, padding: float | None = None) -> Tensor:
    """[n, h, Q or K, d]: a view for a block, a copy for a stack. `side`: 0 queries, 1 keys.

    `padding`: what stands at padded tokens; None: no matter what.
    """
    tokens = part.keys if side else part.queries
    if not isinstance(tokens, Padded):
        return states_1hTd[:, :, slice(*tokens)]
    states_Phd = states_1hTd[0].transpose(0, 1).index_select(0, tokens.index_P)
    if padding is not None and not tokens.is_full:
        states_Phd.index_fill_(0, tokens.padding_Z, padding)
    return _rows(states_Phd, tokens)


def _rows(states_Phd: Tensor, tokens: Padded) -> Tensor:
    """[n, h, L, d]."""
    return states_Phd.view(*tokens.index_nL.shape, *states_Phd.shape[1:]).transpose(1, 2)


def _mask(part: Part, like: Tensor) -> Tensor | None:
    """Additive mask, broadcast over [n, h, Q, K], or None."""
    if isinstance(part, Block):
        hidden = None if part.visible_QK is None else ~part.visible_QK
    elif part.causal or part.keys.is_full:
        return None  # under a causal mask no real query sees the padding behind it
    else:
        hidden = ~part.keys.is_real_nL[:, None, None]
    return None if hidden is None else torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf)


def _real(states_nhLd: Tensor, tokens: Padded) -> Tensor:
    """[R, h, d]: what is no padding."""
    states_Phd = states_nhLd.transpose(1, 2).flatten(0, 1)
    return states_Phd if tokens.is_full else states_Phd.index_select(0, tokens.real_R)


def _join(out_Thd: Tensor, sums_Th: Tensor, part: Part, result_nhQd: Tensor, sums_nhQ: Tensor) -> None:
    """Join a part's softmax to what its queries have already: a mean weighted by the normalizers."""
    tokens = part.queries
    if isinstance(tokens, Padded):
        result_Rhd, sums_Rh = _real(result_nhQd, tokens), _real(sums_nhQ[..., None], tokens)[..., 0]
        if not part.first:
            before_Rhd, before_Rh = out_Thd.index_select(0, tokens.index_R), sums_Th.index_select(0, tokens.index_R)
            result_Rhd, sums_Rh = _joined(before_Rhd, before_Rh, result_Rhd, sums_Rh)
        out_Thd.index_copy_(0, tokens.index_R, result_Rhd)
        sums_Th.index_copy_(0, tokens.index_R, sums_Rh)
        return
    out_Qhd, sums_Qh = out_Thd[slice(*tokens)], sums_Th[slice(*tokens)]
    result_Qhd, new_Qh = result_nhQd[0].transpose(0, 1), sums_nhQ[0].t()
    if part.first:
        out_Qhd.copy_(result_Qhd)
        sums_Qh.copy_(new_Qh)
    else:
        sums_Qh.copy_(_joined(out_Qhd, sums_Qh, result_Qhd, new_Qh)[1])


def _joined(before_Qhd: Tensor, before_Qh: Tensor, result_Qhd: Tensor, sums_Qh: Tensor) -> tuple[Tensor, Tensor]:
    """(`before_Qhd`, overwritten with the joined output; the joined logarithms of the normalizers)."""
    total_Qh = torch.logaddexp(before_Qh, sums_Qh)
    old_Qh1, new_Qh1 = (before_Qh - total_Qh).exp_()[..., None], (sums_Qh - total_Qh).exp_()[..., None]
    if before_Qhd.dtype == total_Qh.dtype:
        return before_Qhd.mul_(old_Qh1).addcmul_(result_Qhd, new_Qh1), total_Qh
    return before_Qhd.copy_(before_Qhd * old_Qh1 + result_Qhd * new_Qh1), total_Qh


def _add(total_1hTd: Tensor, part: Part, grad_nhLd: Tensor, side: int, *, write: bool) -> None:
    """Add a part's gradient at its place, or write it where nothing was."""
    tokens = part.keys if side else part.queries
    total_Thd = total_1hTd[0].transpose(0, 1)
    if isinstance(tokens, Padded):
        (total_Thd.index_copy_ if write else total_Thd.index_add_)(0, tokens.index_R, _real(grad_nhLd, tokens))
    elif write:
        total_Thd[slice(*tokens)] = grad_nhLd[0].transpose(0, 1)
    else:
        total_Thd[slice(*tokens)] += grad_nhLd[0].transpose(0, 1)
