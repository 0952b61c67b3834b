"""Attention over random prefix trees against a dense mask, in float64, values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.training.attention import PackedAttention, segment_by_segment
from stages.training.attention_blocks import BlockAttention
from stages.training.attention_plan import Stack, plan_attention
from stages.training.attention_reads import plan_reads
from stages.training.attention_varlen import Call, States, VarlenAttention, plan_calls
from stages.training.prefix_tree import Segment, ancestors

trees = st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1)), min_size=1, max_size=9)
"""(length, where the parent lies on the path above: 0 none, 1 the segment before)."""


def segments_of(drawn: list[tuple[int, float]]) -> tuple[Segment, ...]:
    """Depth-first: a segment hangs from one of the path that ends at the one before it, or starts a new tree."""
    starts, parents, depths, path = [], [], [], list[int]()
    total = 0
    for index, (length, share) in enumerate(drawn):
        path = path[: round(share * len(path))]
        parent = path[-1] if path else None
        parents.append(parent)
        depths.append(0 if parent is None else depths[parent] + drawn[parent][0])
        starts.append(total)
        total += length
        path.append(index)
    ends = [start + drawn[index][0] for index, start in enumerate(starts)]
    for index in reversed(range(len(drawn))):
        if (parent := parents[index]) is not None:
            ends[parent] = max(ends[parent], ends[index])
    return tuple(Segment(start, start + drawn[i][0], ends[i], depths[i], parents[i]) for i, start in enumerate(starts))


def visible(segments: tuple[Segment, ...], window: int | None) -> Tensor:
    """[T, T] by the definition, token by token."""
    total = segments[-1].stop
    seen = torch.zeros(total, total, dtype=torch.bool)
    for index, segment in enumerate(segments):
        keys = [token for above in ancestors(segments, index) for token in range(above.start, above.stop)]
        for token in range(segment.start, segment.stop):
            keys = [*keys, token]
            seen[token, keys[-window:] if window is not None else keys] = True
    return seen


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ value


@settings(max_examples=60)
@given(trees, st.sampled_from([None, 1, 3, 7]))
def test_blocks_and_segments_equal_a_dense_mask(drawn: list[tuple[int, float]], window: int | None) -> None:
    segments = segments_of(drawn)
    generator = torch.Generator().manual_seed(len(drawn))
    shapes = [(1, 4, segments[-1].stop, 8), (1, 2, segments[-1].stop, 8), (1, 2, segments[-1].stop, 8)]
    states = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    weights = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    expected = dense(*states, visible(segments, window), 0.3)
    expected_grads = torch.autograd.grad((expected * weights).sum(), states)
    parts = plan_attention(segments, window, longest_triangle=3)
    for found in (
        BlockAttention.apply(*states, parts, 0.3).transpose(1, 2),
        segment_by_segment(*states, segments, window, 0.3),
    ):
        torch.testing.assert_close(found, expected)
        for gradient, right in zip(torch.autograd.grad((found * weights).sum(), states), expected_grads, strict=True):
            torch.testing.assert_close(gradient, right)


@settings(max_examples=60)
@given(trees, st.lists(st.integers(0, 10**6), min_size=1, max_size=12))
def test_attention_of_the_tokens_that_are_read(drawn: list[tuple[int, float]], places: list[int]) -> None:
    """Values of the read tokens, and all gradients that come from them."""
    segments = segments_of(drawn)
    total = segments[-1].stop
    generator = torch.Generator().manual_seed(len(drawn))
    shapes = [(1, 4, total, 8), (1, 2, total, 8), (1, 2, total, 8)]
    states = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    reads = torch.tensor([place % total for place in places])
    weights = torch.zeros(shapes[0], dtype=torch.float64)
    weights[:, :, reads] = torch.randn((1, 4, len(reads), 8), generator=generator, dtype=torch.float64)
    expected = dense(*states, visible(segments, None), 0.3)
    parts = plan_reads(segments, reads, longest_triangle=3)
    found = BlockAttention.apply(*states, parts, 0.3, False).transpose(1, 2)
    torch.testing.assert_close(found[:, :, reads], expected[:, :, reads])
    gradients = torch.autograd.grad((found * weights).sum(), states)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), states)
    for gradient, right in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, right)


def test_unread_queries_are_not_computed() -> None:
    """Of a prompt of 300 tokens with answers of 40 and 50, both answers' ends: a query each, with all its keys."""
    plan = plan_reads(segments_of([(300, 0.0), (40, 1.0), (50, 0.5)]), torch.tensor([339, 389, 389]))
    spans = sorted(
        (row[0], int(real.sum()))
        for part in plan
        if isinstance(part, Stack)
        for row, real in zip(part.queries.index_nL.tolist(), part.queries.is_real_nL, strict=True)
    )
    alone = sorted((part.queries[0], part.size[0]) for part in plan if not isinstance(part, Stack))
    assert {start for start, _ in [*spans, *alone]} == {339, 389}
    assert {length for _, length in [*spans, *alone]} == {1}


def test_the_last_layer_makes_no_second_plan_for_kernels_of_varied_lengths() -> None:
    """Which compute all tokens, read or not: the plan is copied to the GPU once a row."""
    packed = PackedAttention(segments_of([(5, 0.0), (3, 1.0)]), torch.device("cpu"))
    calls = packed.calls(None)
    assert packed.reading(torch.tensor([7])).calls(None) is calls


class ByDefinition:
    """What a kernel for rows of different lengths documents, sequence by sequence: causal from the end, window left."""

    def forward(self, states: States, call: Call, scale: float) -> tuple[Tensor, Tensor]:
        out, sums = [], []
        for query, key, value, seen in self._sequences(states, call):
            scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
            out.append((scores.softmax(-1) @ value).transpose(0, 1))
            sums.append(scores.logsumexp(-1).t())
        return torch.cat(out), torch.cat(sums)

    def backward(self, grad: Tensor, states: States, out: Tensor, sums: Tensor, call: Call, scale: float) -> States:
        """By the formula: p = exp(score - sum), d score = p (grad . value - grad . out), with what is given."""
        found, start = [], 0
        for query, key, value, seen in self._sequences(states, call):
            rows = slice(start, start := start + query.shape[1])
            grad_hQd, out_hQd, sums_hQ1 = (
                grad[rows].transpose(0, 1),
                out[rows].transpose(0, 1),
                sums[rows].t()[..., None],
            )
            weights = ((query @ key.transpose(-1, -2) * scale) - sums_hQ1).exp().masked_fill(~seen, 0.0)
            slopes = weights * (grad_hQd @ value.transpose(-1, -2) - (grad_hQd * out_hQd).sum(-1, keepdim=True)) * scale
            few = (2, 2, key.shape[1], key.shape[2])
            grads = (
                (slopes.transpose(-1, -2) @ query).view(few).sum(1),
                (weights.transpose(-1, -2) @ grad_hQd).view(few).sum(1),
            )
            found.append([slopes @ key, *grads])
        return States(*(torch.cat([one.transpose(0, 1) for one in side]) for side in zip(*found, strict=True)))

    def _sequences(self, states: States, call: Call) -> Iterator[tuple[Tensor, ...]]:
        starts = call.queries.starts.tolist(), call.keys.starts.tolist()
        assert call.queries.longest == max(b - a for a, b in pairwise(starts[0]))
        assert call.keys.longest == max(b - a for a, b in pairwise(starts[1]))
        for (a, b), (c, d) in zip(pairwise(starts[0]), pairwise(starts[1]), strict=True):
            distance = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
            seen = torch.ones_like(distance, dtype=torch.bool) if not call.causal else distance >= 0
            if call.window is not None:
                seen &= distance < call.window
            keys = (one[c:d].repeat_interleave(2, 1).transpose(0, 1) for one in states[1:])
            yield states.query_Rhd[a:b].transpose(0, 1), *keys, seen


@settings(max_examples=60)
@given(trees, st.sampled_from([None, 1, 3, 7]))
def test_calls_of_a_kernel_for_varied_lengths_equal_a_dense_mask(
    drawn: list[tuple[int, float]], window: int | None
) -> None:
    segments = segments_of(drawn)
    generator = torch.Generator().manual_seed(len(drawn))
    shapes = [(1, 4, segments[-1].stop, 8), (1, 2, segments[-1].stop, 8), (1, 2, segments[-1].stop, 8)]
    states = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    weights = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    expected = dense(*states, visible(segments, window), 0.3)
    found = VarlenAttention.apply(*states, plan_calls(segments, window), 0.3, ByDefinition()).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    right = torch.autograd.grad((expected * weights).sum(), states)
    for gradient, wanted in zip(torch.autograd.grad((found * weights).sum(), states), right, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_padding_of_a_stack_reaches_no_gradient() -> None:
    """It points at token 0, whose normalizer lies a thousand below its scores with the keys of the other segment."""
    segments = segments_of([(3, 0.0), (5, 0.0)])
    query, key, value = torch.zeros(3, 1, 1, 8, 8, dtype=torch.float64).unbind()
    query[..., 0, 0], key[..., 0, 0], key[..., 3:, 0], value[..., 1] = 100.0, -10.0, 10.0, 1.0
    states = [one.clone().requires_grad_() for one in (query, key, value)]
    (part,) = plan_attention(segments, None)
    assert isinstance(part, Stack)
    assert not part.queries.is_full
    found = BlockAttention.apply(*states, [part], 1.0).transpose(1, 2)
    expected = dense(*states, visible(segments, None), 1.0)
    weights = torch.arange(64.0, dtype=torch.float64).view(1, 1, 8, 8)
    gradients = torch.autograd.grad((found * weights).sum(), states)
    for gradient, right in zip(gradients, torch.autograd.grad((expected * weights).sum(), states), strict=True):
        torch.testing.assert_close(gradient, right)


def test_many_short_rows_are_few_calls_and_long_ones_have_no_padding() -> None:
    short = segments_of([(10 + i % 3, 0.0) for i in range(64)])
    plan = plan_attention(short, None)
    assert len(plan) == 1
    assert isinstance(plan[0], Stack)
    long = segments_of([(250, 0.0), (32, 1.0), (32, 0.5), (200, 0.0)])
    plan = plan_attention(long, None)
    assert isinstance(plan[2], Stack)
    assert [part.size for part in plan if not isinstance(part, Stack)] == [(250, 250), (200, 200), (64, 250)]


def test_a_long_triangle_is_cut_so_that_little_is_computed_in_vain() -> None:
    plan = plan_attention(segments_of([(4096, 0.0)]), None)
    scores = sum(
        part.queries.index_nL.shape[0] * part.queries.index_nL.shape[1] * part.keys.index_nL.shape[1]
        if isinstance(part, Stack)
        else part.size[0] * part.size[1]
        for part in plan
    )
    assert scores == 4096 * 4096 // 2 + 16 * 256 * 256 // 2


def test_a_window_costs_no_square() -> None:
    """One row of 1,000 tokens, window 10: every tile sees at most two windows."""
    plan = plan_attention(segments_of([(1000, 0.0)]), 10)
    assert sum(part.size[0] * part.size[1] for part in plan if not isinstance(part, Stack)) <= 1000 * 20
