"""Attention over a packed row by kernels that take rows of different lengths: torch's own, on a GPU.

T tokens of the row, R of a part, h query heads, k key heads, d head size. Every segment attends to itself, causally,
in one call; then all descendants of the segments of one depth attend to these, in a call a depth. So a prefix's keys
are read by all its branches together and never copied. Each call gives the softmax over its own keys with the
logarithm of its normalizer, and calls are joined by their normalizers; the way back through a call is exact when it
gets output and normalizer of all calls together (arXiv:2205.14135, appendix B.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.training.attention_plan import is_windowed
from stages.training.prefix_tree import Segment, ancestors


class Tokens(NamedTuple):
    """Tokens of the row, sequence after sequence."""

    starts: Tensor
    """int32 [n + 1], where every sequence begins among them."""
    longest: int
    index_R: Tensor | None = None
    """Which they are; None: all of the row, in order."""
    place_T: Tensor | None = None
    """Where each token of the row stands among them, R: nowhere; None: where they are the row, or stand twice."""

    def to(self, device: torch.device) -> Tokens:
        """On another device."""
        starts, index_R, place_T = (
            None if one is None else one.to(device, non_blocking=True)
            for one in (self.starts, self.index_R, self.place_T)
        )
        assert starts is not None
        return Tokens(starts, self.longest, index_R, place_T)

    def take(self, states_T: Tensor) -> Tensor:
        """[R, ...] of the row's."""
        return states_T if self.index_R is None else states_T.index_select(0, self.index_R)

    def spread(self, states_R: Tensor, elsewhere: float) -> Tensor:
        """[T, ...]: back in their places. Without duplicates, for writing by index is slow where it must not race."""
        if self.place_T is None:
            return states_R
        nowhere = states_R.new_full((1, *states_R.shape[1:]), elsewhere)
        return torch.cat([states_R, nowhere]).index_select(0, self.place_T)

    def add(self, total_T: Tensor, states_R: Tensor) -> Tensor:
        """total + states in their places, in the memory of `total`; a token that stands twice gets the sum."""
        if self.index_R is not None and self.place_T is None:
            return total_T.index_add_(0, self.index_R, states_R)
        return total_T.add_(self.spread(states_R, 0.0))


@dataclass(frozen=True)
class Call:
    """One call of a kernel: sequence i of the queries attends to sequence i of the keys."""

    queries: Tokens
    keys: Tokens
    causal: bool
    """The last query of a sequence sees its last key, the one before it one key less."""
    window: int | None = None

    def to(self, device: torch.device) -> Call:
        """On another device."""
        return replace(self, queries=self.queries.to(device), keys=self.keys.to(device))


def plan_calls(segments: Sequence[Segment], window: int | None) -> list[Call]:
    """The calls of a row; the first has every token of the row as a query."""
    if is_windowed(segments, window):
        return [_along_paths(segments, window)]
    own = _whole([segment.tokens for segment in segments])
    calls = [Call(own, own, causal=True)]
    depths: dict[int, list[Segment]] = {}
    for index, segment in enumerate(segments):
        if segment.end > segment.stop:
            depths.setdefault(len(ancestors(segments, index)), []).append(segment)
    total = segments[-1].stop
    for _, above in sorted(depths.items()):
        queries = _chosen([(one.stop, one.end) for one in above], total)
        calls.append(Call(queries, _chosen([(one.start, one.stop) for one in above], total), causal=False))
    return calls


def _along_paths(segments: Sequence[Segment], window: int | None) -> Call:
    """Every segment with a copy of the keys on its path: a window slides over them as over a plain sequence."""
    paths = [[*ancestors(segments, index), segment] for index, segment in enumerate(segments)]
    index_R = torch.cat([torch.arange(above.start, above.stop) for path in paths for above in path])
    lengths = [sum(above.tokens for above in path) for path in paths]
    keys = _whole(lengths)._replace(index_R=index_R)
    return Call(_whole([segment.tokens for segment in segments]), keys, causal=True, window=window)


def _whole(lengths: Sequence[int]) -> Tokens:
    return Tokens(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), max(lengths))


def _chosen(spans: Sequence[tuple[int, int]], total: int) -> Tokens:
    index_R = torch.cat([torch.arange(*span) for span in spans])
    place_T = torch.full((total,), len(index_R))
    place_T[index_R] = torch.arange(len(index_R))
    return _whole([stop - start for start, stop in spans])._replace(index_R=index_R, place_T=place_T)


class States(NamedTuple):
    """What one call is given."""

    query_Rhd: Tensor
    key_Rkd: Tensor
    value_Rkd: Tensor


class Kernel(Protocol):
    """Attention of sequences of different lengths."""

    def forward(self, states: States, call: Call, scale: float) -> tuple[Tensor, Tensor]:
        """(output [R, h, d], logarithms of the normalizers [R, h])."""
        ...

    def backward(
        self, grad_Rhd: Tensor, states: States, out_Rhd: Tensor, sums_Rh: Tensor, call: Call, scale: float
    ) -> States:
        """Gradients of the states, with the output and the normalizers of all calls."""
        ...


class VarlenAttention(torch.autograd.Function):
    """(query [1, h, T, d], key and value [1, k, T, d], calls, scale, kernel) -> [1, T, h, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        query_1hTd: Tensor,
        key_1kTd: Tensor,
        value_1kTd: Tensor,
        calls: list[Call],
        scale: float,
        kernel: Kernel,
    ) -> Tensor:
        states = _rows(query_1hTd, key_1kTd, value_1kTd)
        out_Thd, sums_Th = kernel.forward(_taken(states, calls[0]), calls[0], scale)
        for call in calls[1:]:
            out_Rhd, sums_Rh = kernel.forward(_taken(states, call), call, scale)
            spread = call.queries.spread(out_Rhd, 0.0), call.queries.spread(sums_Rh, -torch.inf)
            out_Thd, sums_Th = _joined(out_Thd, sums_Th, *spread)
        ctx.save_for_backward(query_1hTd, key_1kTd, value_1kTd, out_Thd, sums_Th)
        ctx.calls, ctx.scale, ctx.kernel = calls, scale, kernel
        return out_Thd[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_1Thd: Tensor) -> tuple[Tensor | None, ...]:
        *given, out_Thd, sums_Th = ctx.saved_tensors
        states = _rows(*given)
        totals: list[Tensor] = []
        for call in ctx.calls:
            grad_Rhd, out_Rhd, sums_Rh = map(call.queries.take, (grad_1Thd[0], out_Thd, sums_Th))
            grads = ctx.kernel.backward(grad_Rhd, _taken(states, call), out_Rhd, sums_Rh, call, ctx.scale)
            sides = call.queries, call.keys, call.keys
            if not totals:
                totals = [_first(grad, side, len(out_Thd)) for grad, side in zip(grads, sides, strict=True)]
            else:
                totals = [side.add(total, grad) for total, grad, side in zip(totals, grads, sides, strict=True)]
        return *(total.transpose(0, 1)[None] for total in totals), None, None, None


def _rows(query_1hTd: Tensor, key_1kTd: Tensor, value_1kTd: Tensor) -> States:
    return States(*(one[0].transpose(0, 1) for one in (query_1hTd, key_1kTd, value_1kTd)))


def _taken(states: States, call: Call) -> States:
    sides = call.queries, call.keys, call.keys
    return States(*(side.take(one).contiguous() for one, side in zip(states, sides, strict=True)))


def _first(grad_R: Tensor, side: Tokens, tokens: int) -> Tensor:
    """The gradient of the first call as the row's."""
    return grad_R if side.index_R is None else side.add(grad_R.new_zeros(tokens, *grad_R.shape[1:]), grad_R)


def _joined(first: Tensor, first_sums: Tensor, second: Tensor, second_sums: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over the keys of both; the second's sums may be -inf, which is no key."""
    total_sums = torch.logaddexp(first_sums, second_sums)
    weights = torch.exp(second_sums - total_sums)[..., None]
    wide = torch.promote_types(first.dtype, torch.float32)
    return torch.lerp(first.to(wide), second.to(wide), weights).to(first.dtype), total_sums
