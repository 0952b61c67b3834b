"""torch's two CUDA kernels for sequences of different lengths, called without its wrappers, which keep the
normalizers to themselves. Both are deterministic where torch is told to be.

R queries, R' keys, n sequences, h query heads, k key heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.training.attention_varlen import Call, Kernel, States

_MASK_NONE, _MASK_CAUSAL_FROM_THE_END = 0, 2
_SUMS_ALIGNED = 32
"""The float32 kernel's normalizers have room for a multiple of so many queries."""


class FlashKernel:
    """FlashAttention-2 (arXiv:2307.08691), for bfloat16 and float16."""

    def forward(self, states: States, call: Call, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        out_Rhd, sums_hR, *_ = torch.ops.aten._flash_attention_forward(
            *states, *_lengths(call), 0.0, call.causal, False, scale=scale, **_window(call)
        )
        return out_Rhd, sums_hR.t()

    def backward(
        self, grad_Rhd: Tensor, states: States, out_Rhd: Tensor, sums_Rh: Tensor, call: Call, scale: float
    ) -> States:
        """See `Kernel`."""
        # of dropout, which there is none of
        draws = torch.zeros(2, dtype=torch.uint64, device=grad_Rhd.device)
        given = grad_Rhd.contiguous(), *states, out_Rhd, sums_Rh.t().contiguous()
        grads = torch.ops.aten._flash_attention_backward(
            *given, *_lengths(call), 0.0, call.causal, draws, draws[:0], scale=scale, **_window(call)
        )
        return States(*grads)


class EfficientKernel:
    """Memory-efficient attention (arXiv:2112.05682), for float32. It has no window and no groups of heads."""

    def forward(self, states: States, call: Call, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        out_1Rhd, sums_nhL, *_ = torch.ops.aten._efficient_attention_forward(
            *_for_all_heads(states), None, *_lengths(call), 0.0, _mask(call), True, scale=scale
        )
        sums_Ph = sums_nhL.transpose(1, 2).flatten(0, 1)
        return out_1Rhd[0], sums_Ph.index_select(0, _padded_places(call, out_1Rhd.shape[1]))

    def backward(
        self, grad_Rhd: Tensor, states: States, out_Rhd: Tensor, sums_Rh: Tensor, call: Call, scale: float
    ) -> States:
        """See `Kernel`."""
        queries, heads = sums_Rh.shape
        sequences = len(call.queries.starts) - 1
        sums_Ph = sums_Rh.new_full((sequences * _room(call), heads), torch.inf)
        sums_Ph[_padded_places(call, queries)] = sums_Rh
        sums_nhL = sums_Ph.view(sequences, -1, heads).transpose(1, 2).contiguous()
        seed = torch.zeros((), dtype=torch.int64, device=sums_Rh.device)  # of dropout, which there is none of
        grads = torch.ops.aten._efficient_attention_backward(
            grad_Rhd[None].contiguous(),
            *_for_all_heads(states),
            None,
            out_Rhd[None].contiguous(),
            *_lengths(call),
            sums_nhL,
            0.0,
            seed,
            seed,
            _mask(call),
            False,
            scale=scale,
        )
        key_heads = states.key_Rkd.shape[1]
        return States(grads[0][0], *(grad[0].unflatten(1, (key_heads, -1)).sum(2) for grad in grads[1:3]))


def kernel_for(query: Tensor, *, is_windowed: bool) -> Kernel | None:
    """What computes attention for such queries [1, h, T, d]; None: neither does."""
    size = query.shape[-1]
    if not query.is_cuda:
        return None
    if query.dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= 256:
        return FlashKernel()
    if query.dtype == torch.float32 and size % 4 == 0 and not is_windowed:
        return EfficientKernel()
    return None


def _lengths(call: Call) -> tuple[Tensor, Tensor, int, int]:
    return call.queries.starts, call.keys.starts, call.queries.longest, call.keys.longest


def _window(call: Call) -> dict[str, int]:
    return {
        "window_size_left": -1 if call.window is None else call.window - 1,
        "window_size_right": 0 if call.causal else -1,
    }


def _mask(call: Call) -> int:
    return _MASK_CAUSAL_FROM_THE_END if call.causal else _MASK_NONE


def _room(call: Call) -> int:
    return -(-call.queries.longest // _SUMS_ALIGNED) * _SUMS_ALIGNED


def _padded_places(call: Call, queries: int) -> Tensor:
    """[R]: where each query stands when every sequence has room for the longest."""
    starts = call.queries.starts.long()
    sequence_R = torch.repeat_interleave(starts.diff(), output_size=queries)
    return torch.arange(queries, device=starts.device) - starts[sequence_R] + sequence_R * _room(call)


def _for_all_heads(states: States) -> tuple[Tensor, ...]:
    """[1, R, h, d] each."""
    repeats = states.query_Rhd.shape[1] // states.key_Rkd.shape[1]
    keys = (states.key_Rkd, states.value_Rkd)
    return states.query_Rhd[None], *(one.repeat_interleave(repeats, 1)[None] for one in keys)
