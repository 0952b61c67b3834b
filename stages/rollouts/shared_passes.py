"""The two kinds of forward pass over shared prompts: prompts alone, and one more token of every row.

n prompts of a pass, T tokens, P rows with padding, h query heads, k key heads, r query heads of a key head, d head
size, L tokens of the longest row of its own, S prompts of a span, M rows of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.rollouts.arena import Arena
from stages.rollouts.partial_attention import Piece, Scores, attend, attend_causally, joined, pieces_of
from stages.rollouts.prompt_groups import PromptGroups, Span


@dataclass(frozen=True)
class PromptPass:
    """Keeps the keys and values of prompts, padded on the right, in these slots of the arena."""

    prompts: Arena
    slots_n: Tensor

    def attend(self, layer: int, query_nhTd: Tensor, key_nkTd: Tensor, value_nkTd: Tensor, scores: Scores) -> Tensor:
        """[n, T, h, d]."""
        for room, states in zip(self.prompts.of(layer, key_nkTd, value_nkTd), (key_nkTd, value_nkTd), strict=True):
            room[:, :, : states.shape[2]].index_copy_(0, self.slots_n, states)
        return attend_causally(query_nhTd, key_nkTd, value_nkTd, scores).transpose(1, 2)


@dataclass(frozen=True)
class StepPass:
    """Every row attends to its prompt's keys, all rows of a prompt together, and to its own tokens."""

    own: Arena
    prompts: Arena
    groups: Callable[[int], PromptGroups]
    """For so many query heads of a key head."""
    place_P: Tensor
    """Of the new token among the row's own."""
    before_P: Tensor
    """Tokens of the row's prompt that stand before its own."""
    longest: int
    """L, padded."""
    last_position: int
    """Of the longest row."""
    _index: dict[int, Tensor] = field(default_factory=dict)
    _own_pieces: dict[int | None, list[Piece]] = field(default_factory=dict)
    _prompt_pieces: dict[tuple[int | None, int], list[list[Piece]]] = field(default_factory=dict)

    def attend(self, layer: int, query_Ph1d: Tensor, key_Pk1d: Tensor, value_Pk1d: Tensor, scores: Scores) -> Tensor:
        """[P, 1, h, d]."""
        rows, heads, _, size = query_Ph1d.shape
        own = self.own.of(layer, key_Pk1d, value_Pk1d)
        for room, states in zip(own, (key_Pk1d, value_Pk1d), strict=True):
            self._write(room, states)
        key_heads = key_Pk1d.shape[1]
        query_Pkrd = query_Ph1d.reshape(rows, key_heads, heads // key_heads, size)
        window = scores.window if scores.window is not None and scores.window <= self.last_position else None
        keys, values = (room[:rows, :, : self.longest] for room in own)
        out, sums = attend(query_Pkrd, keys, values, self._of_own(window, query_Ph1d.dtype), scores)
        groups = self.groups(heads // key_heads)
        if groups.spans:
            out, _ = joined(out, sums, *self._attend_to_prompts(layer, query_Pkrd, scores, window, groups))
        return out.reshape(rows, 1, heads, -1)

    def _write(self, room: Tensor, states_Pk1d: Tensor) -> None:
        slots, heads, tokens, size = room.shape
        if heads not in self._index:
            first_Pk = torch.arange(len(self.place_P) * heads, device=room.device).view(-1, heads) * tokens
            self._index[heads] = (first_Pk + self.place_P[:, None]).flatten()
        room.view(slots * heads * tokens, size).index_copy_(0, self._index[heads], states_Pk1d.reshape(-1, size))

    def _of_own(self, window: int | None, dtype: torch.dtype) -> list[Piece]:
        if window not in self._own_pieces:
            distance_PL = self.place_P[:, None] - torch.arange(self.longest, device=self.place_P.device)
            seen_PL = distance_PL >= 0 if window is None else (distance_PL >= 0) & (distance_PL < window)
            self._own_pieces[window] = pieces_of(seen_PL[:, None], dtype)
        return self._own_pieces[window]

    def _attend_to_prompts(
        self, layer: int, query_Pkrd: Tensor, scores: Scores, window: int | None, groups: PromptGroups
    ) -> tuple[Tensor, Tensor]:
        """(output [P, k, r, d], sums [P, k, r]) over the keys of each row's prompt."""
        repeats = query_Pkrd.shape[2]
        outs, sums = [], []
        of_spans = self._of_prompts(window, repeats, query_Pkrd.dtype, groups)
        for span, pieces in zip(groups.spans, of_spans, strict=True):
            prompts, members = span.rows_SM.shape
            keys, values = (room[span.start : span.stop] for room in self.prompts.layers[layer])
            together = query_Pkrd.index_select(0, span.rows_SM.flatten()).unflatten(0, (prompts, members))
            out_SkRd, sums_SkR = attend(together.transpose(1, 2).flatten(2, 3), keys, values, pieces, scores)
            outs.append(out_SkRd.unflatten(2, (members, repeats)).transpose(1, 2).flatten(0, 1))
            sums.append(sums_SkR.unflatten(2, (members, repeats)).transpose(1, 2).flatten(0, 1))
        return _together(outs).index_select(0, groups.place_P), _together(sums).index_select(0, groups.place_P)

    def _of_prompts(
        self, window: int | None, repeats: int, dtype: torch.dtype, groups: PromptGroups
    ) -> list[list[Piece]]:
        """The pieces of every span."""
        if (window, repeats) not in self._prompt_pieces:
            seen = (self._seen(span, window) for span in groups.spans)
            if window is not None:
                seen = (seen_SMK.repeat_interleave(repeats, 1) for seen_SMK in seen)
            self._prompt_pieces[window, repeats] = [pieces_of(seen_SQK, dtype) for seen_SQK in seen]
        return self._prompt_pieces[window, repeats]

    def _seen(self, span: Span, window: int | None) -> Tensor:
        """bool [S, 1 or M, K]."""
        place_K = torch.arange(span.tokens, device=span.lengths_S.device)
        seen_S1K = (place_K < span.lengths_S[:, None])[:, None]
        if window is None:
            return seen_S1K
        position_SM1 = (self.before_P + self.place_P)[span.rows_SM][..., None]
        return seen_S1K & (position_SM1 - place_K < window)


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
