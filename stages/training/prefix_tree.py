"""Sequences that begin alike, as a tree of segments in one packed row: every shared token stands there once.

T tokens of the row. Segments stand in depth-first order, so that all descendants of a segment follow it directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]

LEAST_SHARED = 16
"""Shared tokens below which branches are kept apart: a segment of its own would cost more than it saves."""


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to `stop` of the row; a token sees what is before it here, and all of the ancestors."""

    start: int
    stop: int
    end: int
    """Where the last descendant stops; `stop` where there is none."""
    position: int
    """Place of the first token in its sequences."""
    parent: int | None
    """Index of the segment that this one continues."""

    @property
    def tokens(self) -> int:
        """Length."""
        return self.stop - self.start


@dataclass
class PackedRow:
    """The row while it is being built, and then what is known of it."""

    tokens: list[Sequence[int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    parents: list[int | None] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    num_tokens: int = 0

    def add_sequences(self, prefix: Sequence[int], branches: Sequence[Sequence[int]]) -> list[Positions]:
        """Append `prefix` and its branches. Returns, for every branch, where each token of prefix + branch stands."""
        if len(branches) == 1:
            return [self._append([*prefix, *branches[0]], None, 0)]
        places = [np.empty(0, np.int64)] * len(branches)
        if not prefix:
            self._split(branches, list(range(len(branches))), 0, None, places[0], places)
            return places
        own = self._append(prefix, None, 0)
        root = len(self.tokens) - 1
        self._split(branches, list(range(len(branches))), 0, root, own, places)
        self.ends[root] = self.num_tokens
        return places

    def fill_up(self, multiple: int) -> None:
        """End with tokens that no sequence sees. They are in sequences no longer than the longest one there is: a model
        need not have positions beyond that."""
        missing = -self.num_tokens % multiple
        longest = max(depth + len(tokens) for depth, tokens in zip(self.depths, self.tokens, strict=True))
        while missing:
            length = min(longest, missing)
            self._append([0] * length, None, 0)
            missing -= length

    def _split(
        self,
        branches: Sequence[Sequence[int]],
        members: list[int],
        offset: int,
        parent: int | None,
        above: Positions,
        places: list[Positions],
    ) -> None:
        """Append what the members have after `offset` tokens, as children of `parent`."""
        for alike in _beginning_alike(branches, members, offset):
            first = branches[alike[0]]
            if len(alike) == 1:
                rest = first[offset:]
                places[alike[0]] = np.concatenate([above, self._append(rest, parent, len(above))]) if rest else above
                continue
            stop = offset + _common_length([branches[member] for member in alike], offset)
            path = np.concatenate([above, self._append(first[offset:stop], parent, len(above))])
            index = len(self.tokens) - 1
            self._split(branches, alike, stop, index, path, places)
            self.ends[index] = self.num_tokens

    def _append(self, tokens: Sequence[int], parent: int | None, depth: int) -> Positions:
        start = self.num_tokens
        self.num_tokens += len(tokens)
        self.tokens.append(tokens)
        self.starts.append(start)
        self.ends.append(self.num_tokens)
        self.parents.append(parent)
        self.depths.append(depth)
        return np.arange(start, self.num_tokens, dtype=np.int64)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """All segments, in the order of the row. Asked for once the row is complete."""
        return tuple(
            Segment(start, start + len(tokens), end, depth, parent)
            for tokens, start, end, depth, parent in zip(
                self.tokens, self.starts, self.ends, self.depths, self.parents, strict=True
            )
        )

    def token_ids(self) -> Positions:
        """[T]."""
        return np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens in self.tokens])

    def position_ids(self) -> Positions:
        """[T] place of every token in its sequences."""
        return np.concatenate(
            [np.arange(depth, depth + len(tokens)) for depth, tokens in zip(self.depths, self.tokens, strict=True)]
        )


def ancestors(segments: Sequence[Segment], index: int) -> list[Segment]:
    """From the root down to the parent."""
    path: list[Segment] = []
    parent = segments[index].parent
    while parent is not None:
        path.insert(0, segments[parent])
        parent = segments[parent].parent
    return path


def _beginning_alike(branches: Sequence[Sequence[int]], members: Sequence[int], offset: int) -> list[list[int]]:
    """Members that have the next LEAST_SHARED tokens in common, or end alike before that; first come first."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for member in members:
        tokens = branches[member]
        key = tuple(tokens[offset : offset + LEAST_SHARED])
        alike.setdefault(key if len(key) == LEAST_SHARED else (-1 - member,), []).append(member)
    return list(alike.values())


def _common_length(sequences: Sequence[Sequence[int]], offset: int) -> int:
    """Tokens after `offset` that all sequences share."""
    first = sequences[0]
    shared = len(first)
    for other in sequences[1:]:
        place = offset
        shared = min(shared, len(other))
        while place < shared and other[place] == first[place]:
            place += 1
        shared = place
    return shared - offset
