"""The two kinds of forward pass over shared prompts: prompts alone, and one more token of every row.

n prompts of a pass, T tokens, P rows with padding, h query heads, k key heads, r query heads of a key head, d head
size, L tokens of the longest row of its own, S prompts of a span, M rows of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.rollouts.kv_arena import Arena
from stages.rollouts.partial_attention import (
    KEYS_AT_ONCE,
    Part,
    Scores,
    Seen,
    additive,
    attend,
    attend_causally,
    cut,
    seen_of,
    with_more,
)
from stages.rollouts.prompt_groups import PromptGroups, Span

HEADS_APART = 4
"""Query heads of one key head up to which the CPU's kernel is faster with one query for each head (two to four times,
with up to 64 keys) than with a key head's queries together."""


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


@dataclass
class Views:
    """What steps need alike until the rows or the prompts are others; by layer."""

    size: tuple[int, int] = (0, 0)
    """Rows and tokens of `own`."""
    own: dict[int, list[Part]] = field(default_factory=dict)
    prompts: dict[int, list[list[Part]]] = field(default_factory=dict)
    """Of every span."""
    seen: list[list[Seen]] | None = None
    """Prompts' keys without a window, of every span."""

    def forget_prompts(self) -> None:
        """They are others, or have other rows."""
        self.prompts, self.seen = {}, None


@dataclass(frozen=True)
class StepPass:
    """Every row attends to its prompt's keys, all rows of a prompt together, and to its own tokens."""

    own: Arena
    prompts: Arena
    groups: Callable[[int], PromptGroups]
    """For so many query heads of a key head."""
    views: Views
    place_P: Tensor
    """Of the new token among the row's own."""
    before_P: Tensor
    """Tokens of the row's prompt that stand before its own."""
    last_position: int
    """Of the longest row."""
    _index: dict[int, Tensor] = field(default_factory=dict)
    _own_seen: dict[int | None, list[Seen]] = field(default_factory=dict)
    _windowed_seen: dict[tuple[int, int], list[list[Seen]]] = field(default_factory=dict)

    def attend(self, layer: int, query_Ph1d: Tensor, key_Pk1d: Tensor, value_Pk1d: Tensor, scores: Scores) -> Tensor:
        """[P, 1, h, d]."""
        rows, heads, _, size = query_Ph1d.shape
        own = self.own.of(layer, key_Pk1d, value_Pk1d)
        self._write(own[0], key_Pk1d)
        self._write(own[1], value_Pk1d)
        if layer not in self.views.own:
            self.views.own[layer] = cut(own[0][:rows], own[1][:rows], self.views.size[1])
        key_heads = key_Pk1d.shape[1]
        query_Pkrd = query_Ph1d.reshape(rows, key_heads, heads // key_heads, size)
        window = scores.window if scores.window is not None and scores.window <= self.last_position else None
        query = query_Ph1d if heads // key_heads <= HEADS_APART else query_Pkrd
        out, sums = attend(query, self.views.own[layer], self._seen_of_own(window, query_Ph1d.dtype), scores)
        out, sums = out.reshape(query_Pkrd.shape), sums.reshape(query_Pkrd.shape[:3])
        groups = self.groups(heads // key_heads)
        if groups.spans:
            out = with_more(out, sums, *self._attend_to_prompts(layer, query_Pkrd, scores, window, groups))
        return out.reshape(rows, 1, heads, -1)

    def _write(self, room: Tensor, states_Pk1d: Tensor) -> None:
        slots, heads, tokens, size = room.shape
        if heads not in self._index:
            first_Pk = torch.arange(len(self.place_P) * heads, device=room.device).view(-1, heads) * tokens
            self._index[heads] = (first_Pk + self.place_P[:, None]).flatten()
        room.view(slots * heads * tokens, size).index_copy_(0, self._index[heads], states_Pk1d.reshape(-1, size))

    def _seen_of_own(self, window: int | None, dtype: torch.dtype) -> list[Seen]:
        if window not in self._own_seen:
            tokens = self.views.size[1]
            distance_PL = self.place_P[:, None] - torch.arange(tokens, device=self.place_P.device)
            if window is None and tokens <= KEYS_AT_ONCE:
                # every row sees its first token
                self._own_seen[window] = [Seen(additive(distance_PL >= 0, dtype)[:, None, None], None)]
            else:
                seen_PL = (distance_PL >= 0) & (distance_PL < (window or tokens))
                self._own_seen[window] = seen_of(seen_PL[:, None], dtype)
        return self._own_seen[window]

    def _attend_to_prompts(
        self, layer: int, query_Pkrd: Tensor, scores: Scores, window: int | None, groups: PromptGroups
    ) -> tuple[Tensor, Tensor]:
        """(output [P, k, r, d], sums [P, k, r]) over the keys of each row's prompt."""
        if layer not in self.views.prompts:
            keys, values = self.prompts.known(layer)
            self.views.prompts[layer] = [
                cut(keys[span.start : span.stop], values[span.start : span.stop], span.tokens) for span in groups.spans
            ]
        _, heads, repeats, size = query_Pkrd.shape
        outs, sums = [], []
        of_spans = self._seen_of_prompts(window, repeats, query_Pkrd.dtype, groups)
        for span, parts, seen in zip(groups.spans, self.views.prompts[layer], of_spans, strict=True):
            chosen = query_Pkrd if groups.in_order else query_Pkrd.index_select(0, span.rows_R)
            together_SMkrd = chosen.view(*span.rows_SM.shape, heads, repeats, size)
            out_SkRd, sums_SkR = attend(together_SMkrd.transpose(1, 2).flatten(2, 3), parts, seen, scores)
            found = len(span.lengths_S), heads, -1, repeats
            outs.append(out_SkRd.reshape(*found, out_SkRd.shape[3]).transpose(1, 2).flatten(0, 1))
            sums.append(sums_SkR.reshape(found).transpose(1, 2).flatten(0, 1))
        if groups.in_order:
            return outs[0], sums[0]
        return _together(outs).index_select(0, groups.place_P), _together(sums).index_select(0, groups.place_P)

    def _seen_of_prompts(
        self, window: int | None, repeats: int, dtype: torch.dtype, groups: PromptGroups
    ) -> list[list[Seen]]:
        """Of every span."""
        if window is None:
            if self.views.seen is None:
                self.views.seen = [seen_of(_within(span)[:, None], dtype) for span in groups.spans]
            return self.views.seen
        if (window, repeats) not in self._windowed_seen:
            self._windowed_seen[window, repeats] = [
                seen_of(self._in_window(span, window).repeat_interleave(repeats, 1), dtype) for span in groups.spans
            ]
        return self._windowed_seen[window, repeats]

    def _in_window(self, span: Span, window: int) -> Tensor:
        """bool [S, M, K]."""
        position_SM1 = (self.before_P + self.place_P)[span.rows_SM][..., None]
        place_K = torch.arange(span.tokens, device=position_SM1.device)
        return _within(span)[:, None] & (position_SM1 - place_K < window)


def _within(span: Span) -> Tensor:
    """bool [S, K]: keys that are no padding."""
    return torch.arange(span.tokens, device=span.lengths_S.device) < span.lengths_S[:, None]


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
