"""Which tokens of a packed row attend to which, as a few dense blocks instead of a T x T mask.

Every segment attends to itself (causal), and all its descendants to the whole of it (no mask at all: they stand
together behind it). So the work is what separate rows without copies would need, and nothing is masked away but the
upper triangles. Sliding windows cut the blocks into tiles of a window's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from stages.training.prefix_tree import Segment, ancestors

Span = tuple[int, int]

WASTE_WORTH_A_CALL = 4096
"""Scores that may be computed in vain to save a kernel call: about what a call costs beside its work."""
LONGEST_TRIANGLE = 256
"""Tokens up to which computing the hidden half of causal attention costs less than cutting it up."""
LANES = 16
"""Stacks are padded to a multiple: the CPU kernel is up to a fifth slower on what its vectors do not divide."""


@dataclass(frozen=True)
class Block:
    """Queries attending to keys; `causal`: query i sees keys up to i. Without it every query sees every key."""

    queries: Span
    keys: Span
    causal: bool = False
    visible_QK: Tensor | None = None
    """bool, where a sliding window hides some keys."""

    @property
    def size(self) -> tuple[int, int]:
        """(queries, keys)."""
        return self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]

    @property
    def first(self) -> bool:
        """Whether this is the first part that its queries meet: the one that ends with themselves."""
        return self.keys[1] == self.queries[1]


@dataclass(frozen=True)
class Stack:
    """n blocks of about one size, padded to Q queries and K keys."""

    queries: Padded
    keys: Padded
    causal: bool

    @property
    def first(self) -> bool:
        """Whether this is the first part that its queries meet."""
        return self.causal

    def to(self, device: torch.device) -> Stack:
        """The stack on another device."""
        return replace(self, queries=self.queries.to(device), keys=self.keys.to(device))


@dataclass(frozen=True)
class Padded:
    """Tokens of n spans as an [n, L] index; padding points at token 0."""

    index_nL: Tensor
    is_real_nL: Tensor

    @cached_property
    def index_P(self) -> Tensor:
        """P = n L."""
        return self.index_nL.flatten()

    @cached_property
    def real_R(self) -> Tensor:
        """Places among P that are no padding."""
        return self.is_real_nL.flatten().nonzero()[:, 0]

    @cached_property
    def padding_Z(self) -> Tensor:
        """Places among P that are padding."""
        return (~self.is_real_nL).flatten().nonzero()[:, 0]

    @cached_property
    def index_R(self) -> Tensor:
        """The tokens, without padding."""
        return self.index_P.index_select(0, self.real_R)

    @property
    def is_full(self) -> bool:
        """Nothing is padded."""
        return len(self.padding_Z) == 0

    def to(self, device: torch.device) -> Padded:
        """The index on another device."""
        return Padded(self.index_nL.to(device), self.is_real_nL.to(device))


Part = Block | Stack


def plan_attention(
    segments: Sequence[Segment], window: int | None, longest_triangle: int = LONGEST_TRIANGLE
) -> list[Part]:
    """The parts of a row's attention: first those in which every token attends to its own segment, then the others.

    `window`: a token sees itself and at most window - 1 before it, by position; None: everything.
    """
    if window is not None and is_windowed(segments, window):
        blocks = [block for index in range(len(segments)) for block in _tiles(segments, index, window)]
        return sorted(blocks, key=lambda block: not block.first)
    levels: dict[tuple[int, int], list[Block]] = {}
    for index, segment in enumerate(segments):
        depth = len(ancestors(segments, index))
        for level, block in causal_blocks((segment.start, segment.stop), longest_triangle):
            # all triangles come first and together
            levels.setdefault((-1 if block.causal else depth, level), []).append(block)
        if segment.end > segment.stop:
            below = Block((segment.stop, segment.end), (segment.start, segment.stop))
            levels.setdefault((depth, 0), []).append(below)
    # a level at a time: within a stack no query may stand twice
    return [part for _, level in sorted(levels.items(), key=lambda item: item[0]) for part in stacked(level)]


def is_windowed(segments: Sequence[Segment], window: int | None) -> bool:
    """Whether a sliding window of so many tokens hides anything."""
    return window is not None and max(segment.position + segment.tokens for segment in segments) > window


def causal_blocks(span: Span, longest: int, level: int = 1) -> Iterator[tuple[int, Block]]:
    """Causal attention within a span: two halves, and the second seeing the first; the kernel skips nothing itself.

    With every block a number: within those of one number no query stands twice.
    """
    start, stop = span
    if stop - start <= longest:
        yield 0, Block(span, span, causal=True)
        return
    middle = (start + stop + 1) // 2
    yield from causal_blocks((start, middle), longest, level + 1)
    yield from causal_blocks((middle, stop), longest, level + 1)
    yield level, Block((middle, stop), (start, middle))


def _tiles(segments: Sequence[Segment], index: int, window: int) -> Iterator[Block]:
    """Blocks of the queries of one segment, a window's length at a time."""
    segment = segments[index]
    for start in range(segment.start, segment.stop, window):
        stop = min(start + window, segment.stop)
        first = max(segment.start, start - window + 1)
        place = segment.position - segment.start
        if first == start:
            yield Block((start, stop), (start, stop), causal=True)
        else:
            yield _windowed((start, stop), (first, stop), place, place, window)
        for above in ancestors(segments, index):
            there = above.position - above.start
            # the first key that the first query sees; the last query that sees the last key
            first = max(above.start, start + place - window + 1 - there)
            last = min(stop, above.stop - 1 + there + window - place)
            if first < above.stop and start < last:
                yield _windowed((start, last), (first, above.stop), place, there, window)


def _windowed(queries: Span, keys: Span, query_shift: int, key_shift: int, window: int) -> Block:
    """A block with its window; positions are row indices plus a shift."""
    query_Q1 = torch.arange(*queries)[:, None] + query_shift
    key_1K = torch.arange(*keys)[None] + key_shift
    visible_QK = (key_1K <= query_Q1) & (query_Q1 - key_1K < window)
    return Block(queries, keys, visible_QK=None if bool(visible_QK.all()) else visible_QK)


def stacked(blocks: Sequence[Block]) -> list[Part]:
    """Blocks of about one size together, as far as the padding costs less than the calls that it saves."""
    parts: list[Part] = []
    current: list[Block] = []
    for block in sorted(blocks, key=lambda block: block.size, reverse=True):
        if current and _area(_largest(current)) - _area(block.size) > WASTE_WORTH_A_CALL:
            parts.append(_as_part(current))
            current = []
        current.append(block)
    return [*parts, _as_part(current)] if current else parts


def _largest(blocks: Sequence[Block]) -> tuple[int, int]:
    return max(block.size[0] for block in blocks), max(block.size[1] for block in blocks)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _as_part(blocks: Sequence[Block]) -> Part:
    if len(blocks) == 1:
        return blocks[0]
    causal = blocks[0].causal
    queries, keys = [block.queries for block in blocks], [block.keys for block in blocks]
    # without a causal mask, padded keys take a mask of their own
    return Stack(_padded(queries), _padded(keys, exact=not causal), causal)


def _padded(spans: Sequence[Span], *, exact: bool = False) -> Padded:
    starts, stops = torch.tensor(spans).t()
    lengths = stops - starts
    width = int(lengths.max())
    if not (exact and bool((lengths == width).all())):
        width = -(-width // LANES) * LANES
    index_nL = starts[:, None] + torch.arange(width)
    is_real_nL = index_nL < stops[:, None]
    return Padded(index_nL.where(is_real_nL, torch.zeros_like(index_nL)), is_real_nL)
