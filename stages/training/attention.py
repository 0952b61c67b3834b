"""Attention over a packed row of prefix trees, registered with transformers under the name `prefix_tree`.

B = 1 row, h heads, T tokens, d head size. Three ways that give the same numbers: fused kernels over the parts of the
plan (CPU), kernels for rows of different lengths (CUDA), and plain matrix products a segment at a time for what
neither can do (soft-capped scores, dropout, other devices and types).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from stages.training.attention_blocks import BlockAttention
from stages.training.attention_kernels import kernel_for
from stages.training.attention_plan import Part, Stack, is_windowed, plan_attention
from stages.training.attention_reads import plan_reads
from stages.training.attention_varlen import Call, VarlenAttention, plan_calls
from stages.training.prefix_tree import Segment, ancestors

NAME = "prefix_tree"
UNKNOWN_ARGUMENTS = ("s_aux", "position_bias", "head_mask", "cache")
"""What other attention functions take and this one does not: it changes the scores, so it must not be ignored."""

_packed_pass: ContextVar[bool] = ContextVar("packed_pass", default=False)


class UnsupportedAttentionError(Exception):
    """The model asks of its attention what packed rows cannot give."""


class PackedAttention:
    """The segments of one packed row, and the plans made from them: one for every window that a layer has."""

    def __init__(self, segments: Sequence[Segment], device: torch.device, reads_R: Tensor | None = None) -> None:
        self.segments, self.device = tuple(segments), device
        self.reads_R = reads_R
        """The tokens at which the output is read; None: all. What a kernel leaves out at others is zero."""
        self.windows: set[int | None] = set()
        """The sliding windows that layers have asked for."""
        self._parts: dict[int | None, list[Part]] = {}
        self._calls: dict[int | None, list[Call]] = {}

    def parts(self, window: int | None) -> list[Part]:
        """The plan for layers with this sliding window."""
        if window not in self._parts:
            reads_R = None if self.is_whole(window) else self.reads_R
            plan = plan_attention(self.segments, window) if reads_R is None else plan_reads(self.segments, reads_R)
            self._parts[window] = [part.to(self.device) if isinstance(part, Stack) else part for part in plan]
        return self._parts[window]

    def is_whole(self, window: int | None) -> bool:
        """Whether the plan has a place for every token, read or not."""
        return self.reads_R is None or is_windowed(self.segments, window)

    def reading(self, reads_R: Tensor) -> PackedAttention:
        """The same row for a layer whose output is read at these tokens only."""
        restricted = PackedAttention(self.segments, self.device, reads_R)
        restricted.windows = self.windows
        restricted._calls = self._calls  # the kernels that these are for compute all tokens
        return restricted

    def calls(self, window: int | None) -> list[Call]:
        """The same for kernels that take rows of different lengths."""
        window = window if is_windowed(self.segments, window) else None
        if window not in self._calls:
            self._calls[window] = [call.to(self.device) for call in plan_calls(self.segments, window)]
        return self._calls[window]


def register() -> None:
    """Make `attn_implementation="prefix_tree"` known to transformers; more than once does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        return None if _packed_pass.get() else sdpa_mask(*args, **kwargs)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


@contextmanager
def packed_pass() -> Iterator[None]:
    """Inside, transformers makes no mask: the `packed` argument of the forward pass says who sees whom."""
    token = _packed_pass.set(True)
    try:
        yield
    finally:
        _packed_pass.reset(token)


def attend(  # noqa: PLR0913 - the signature is transformers'
    module: nn.Module,
    query_1hTd: Tensor,
    key_1kTd: Tensor,
    value_1kTd: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed: PackedAttention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [1, T, h, d] for a packed row; without `packed`, by the mask it is given."""
    if packed is None and softcap is not None:
        # transformers' sdpa would leave the soft-capping out
        scale = scaling if scaling is not None else query_1hTd.shape[-1] ** -0.5
        return _by_mask(query_1hTd, key_1kTd, value_1kTd, attention_mask, scale, softcap, dropout), None
    if packed is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out_BThd, _ = sdpa_attention_forward(
            module, query_1hTd, key_1kTd, value_1kTd, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out_BThd, None
    if unknown := [name for name in UNKNOWN_ARGUMENTS if kwargs.get(name) is not None]:
        raise UnsupportedAttentionError(f"its attention takes {', '.join(unknown)}")
    packed.windows.add(sliding_window)
    scale = scaling if scaling is not None else query_1hTd.shape[-1] ** -0.5
    kernel = kernel_for(query_1hTd, is_windowed=is_windowed(packed.segments, sliding_window))
    if softcap is not None or dropout or (kernel is None and query_1hTd.device.type != "cpu"):
        out_1hTd = segment_by_segment(
            query_1hTd, key_1kTd, value_1kTd, packed.segments, sliding_window, scale, softcap, dropout
        )
        return out_1hTd.transpose(1, 2), None
    if kernel is not None:
        calls = packed.calls(sliding_window)
        return VarlenAttention.apply(query_1hTd, key_1kTd, value_1kTd, calls, scale, kernel), None
    parts, is_whole = packed.parts(sliding_window), packed.is_whole(sliding_window)
    return BlockAttention.apply(query_1hTd, key_1kTd, value_1kTd, parts, scale, is_whole), None


def segment_by_segment(  # noqa: PLR0913 - what attention can have
    query_1hTd: Tensor,
    key_1kTd: Tensor,
    value_1kTd: Tensor,
    segments: Sequence[Segment],
    window: int | None,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """[1, h, T, d] by the definition: softmax over the keys of a segment's path, itself causal. Differentiable."""
    key_1hTd, value_1hTd = (_for_all_heads(states, query_1hTd) for states in (key_1kTd, value_1kTd))
    out = []
    for index, segment in enumerate(segments):
        path = [slice(above.start, above.stop) for above in [*ancestors(segments, index), segment]]
        key_1hKd = torch.cat([key_1hTd[:, :, part] for part in path], 2)
        value_1hKd = torch.cat([value_1hTd[:, :, part] for part in path], 2)
        place_Q1 = segment.position + torch.arange(segment.tokens, device=key_1hKd.device)[:, None]
        distance_QK = place_Q1 - torch.arange(key_1hKd.shape[2], device=key_1hKd.device)
        seen_QK = distance_QK >= 0 if window is None else (distance_QK >= 0) & (distance_QK < window)
        query_1hQd = query_1hTd[:, :, segment.start : segment.stop]
        out.append(_softmax_attention(query_1hQd, key_1hKd, value_1hKd, seen_QK, scale, softcap, dropout))
    return torch.cat(out, 2)


def _by_mask(
    query_BhQd: Tensor,
    key_BkKd: Tensor,
    value_BkKd: Tensor,
    seen: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
) -> Tensor:
    """[B, Q, h, d]; `seen` is bool [B, 1, Q, K], or None for causal attention."""
    key_BhKd, value_BhKd = (_for_all_heads(states, query_BhQd) for states in (key_BkKd, value_BkKd))
    if seen is None:
        queries, keys = query_BhQd.shape[2], key_BhKd.shape[2]
        seen = torch.ones(queries, keys, dtype=torch.bool, device=query_BhQd.device).tril(keys - queries)
    out_BhQd = _softmax_attention(query_BhQd, key_BhKd, value_BhKd, seen, scale, softcap, dropout)
    return out_BhQd.transpose(1, 2)


def _softmax_attention(
    query_BhQd: Tensor,
    key_BhKd: Tensor,
    value_BhKd: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    scores_BhQK = query_BhQd @ key_BhKd.transpose(-1, -2) * scale
    if softcap is not None:
        scores_BhQK = softcap * torch.tanh(scores_BhQK / softcap)
    wide = torch.promote_types(scores_BhQK.dtype, torch.float32)
    weights_BhQK = scores_BhQK.masked_fill(~seen, -torch.inf).softmax(-1, dtype=wide)
    return torch.dropout(weights_BhQK.to(query_BhQd.dtype), dropout, dropout > 0) @ value_BhKd


def _for_all_heads(states_BkTd: Tensor, query_BhTd: Tensor) -> Tensor:
    return states_BkTd.repeat_interleave(query_BhTd.shape[1] // states_BkTd.shape[1], 1)
