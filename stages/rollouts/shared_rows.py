"""Rows that share their prompts: each prompt is computed once and kept once, and rows enter and leave one by one.

B rows in the making, P rows of a pass with padding, n prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stages.rollouts.kv_arena import Arena
from stages.rollouts.model_attention import in_progress
from stages.rollouts.prompt_groups import PromptGroups, group_rows
from stages.rollouts.room import PROMPT_TOKENS_AT_ONCE, Room, padded_rows, padded_tokens
from stages.rollouts.rows import Leaving, Row
from stages.rollouts.shared_passes import PromptPass, StepPass, Views
from stages.training import last_layer
from stages.training.linear import chosen_for
from stages.training.trunk import trunk_of

_USUAL_PROMPT, USUAL_ROWS = 1024, 32
"""Rows of a product that the library for it is chosen by."""
ENTER_SHARE = 8
"""New prompts are computed once so large a share of the room is free: a pass over few tokens is a slow one."""


class SharedRows:
    """Runs a model that attends by `model_attention`. Slot b of the arena `own` belongs to row b."""

    def __init__(self, model: Any, room: Room, pad_token_id: int) -> None:
        self._model, self._room, self._pad_id = model, room, pad_token_id
        slots = padded_rows(room.rows)
        layers = int(model.config.get_text_config().num_hidden_layers)
        self._own = Arena(slots, room.row_tokens, layers)
        self._prompts = Arena(room.prompts, room.prompt_tokens, layers)
        self._views = Views()
        self._sizes: tuple[int, int, int] | None = None
        """Rows with padding, own tokens and position of the longest row with the next token; None: to be measured."""
        self._device = model.device
        self._place_S = torch.zeros(slots, dtype=torch.long, device=self._device)
        self._before_S = torch.zeros(slots, dtype=torch.long, device=self._device)
        self._prompt_of_row: list[int] = []
        self._requests: list[int] = []
        """Of every prompt, with its length."""
        self._lengths: list[int] = []
        self._groups: dict[int, PromptGroups] = {}
        """By the number of query heads of one key head."""
        self._last = last_layer.reading_nothing(model)

    @property
    def count(self) -> int:
        """B."""
        return len(self._prompt_of_row)

    def room_for(self, waiting: Sequence[Row]) -> int:
        """As many as there are free slots, and prompts for them; none until a pass for them pays."""
        free = self._room.rows - self.count
        known, new = set(self._requests), set[int]()
        rows = 0
        for row in waiting[:free]:
            if row.request not in known:
                new.add(row.request)
                if len(known) + len(new) > self._room.prompts:
                    break
                if self.count and free * ENTER_SHARE < self._room.rows:
                    break
            rows += 1
        return rows

    def enter(self, rows: Sequence[Row]) -> None:
        """Compute the prompts that are new."""
        first = self.count
        known = {request: slot for slot, request in enumerate(self._requests)}
        new: list[Sequence[int]] = []
        for row in rows:
            if row.request not in known:
                known[row.request] = len(self._requests)
                self._requests.append(row.request)
                self._lengths.append(len(row.prompt_ids) - 1)
                new.append(row.prompt_ids[:-1])
            self._prompt_of_row.append(known[row.request])
        lengths = torch.tensor([len(row.prompt_ids) - 1 for row in rows], device=self._device)
        self._before_S[first : self.count] = lengths
        self._place_S[first : self.count] = 0
        self._forget_groups()
        self._compute(new, len(self._requests) - len(new))

    def _compute(self, prompts: list[Sequence[int]], slot: int) -> None:
        """Prompts that follow each other in the slots from `slot` on."""
        start = 0
        while start < len(prompts):
            stop, width = start, 0
            while stop < len(prompts):
                longer = max(width, padded_tokens(len(prompts[stop])))
                if stop > start and longer * (stop + 1 - start) > PROMPT_TOKENS_AT_ONCE:
                    break
                stop, width = stop + 1, longer
            if width:
                self._compute_together(prompts[start:stop], width, slot + start)
            start = stop

    def _compute_together(self, prompts: list[Sequence[int]], width: int, slot: int) -> None:
        ids_nT = torch.tensor([[*ids, *[self._pad_id] * (width - len(ids))] for ids in prompts], device=self._device)
        slots_n = torch.arange(slot, slot + len(prompts), device=self._device)
        positions_1T = torch.arange(width, device=self._device)[None]
        with in_progress(PromptPass(self._prompts, slots_n)), chosen_for(_USUAL_PROMPT):
            trunk_of(self._model)(input_ids=ids_nT, position_ids=positions_1T, use_cache=False, **self._last)

    def step(self, tokens_B: Tensor) -> Tensor:
        """[P, V]."""
        if self._sizes is None:
            self._sizes = self._measure()
        rows, longest, last = self._sizes
        tokens_P = tokens_B
        if rows > self.count:
            tokens_P = tokens_B.new_zeros(rows)
            tokens_P[: self.count] = tokens_B
        place_P, before_P = self._place_S[:rows], self._before_S[:rows]
        positions_P = place_P + before_P
        size = rows, padded_tokens(longest)
        if self._views.size != size:
            self._views.size, self._views.own = size, {}
        step = StepPass(self._own, self._prompts, self._grouped, self._views, place_P, before_P, last)
        with in_progress(step), chosen_for(USUAL_ROWS):
            logits_PV: Tensor = self._model(
                input_ids=tokens_P[:, None], position_ids=positions_P[:, None], use_cache=False, logits_to_keep=1
            ).logits[:, -1]
        self._place_S[: self.count] += 1
        self._sizes = rows, longest + 1, last + 1
        return logits_PV

    def _measure(self) -> tuple[int, int, int]:
        rows = padded_rows(self.count)
        # rows of padding are fed one token in the slots behind, over and over
        self._place_S[self.count : rows] = 0
        self._before_S[self.count : rows] = 0
        places_P = self._place_S[:rows]
        return rows, int(places_P.max()) + 1, int((places_P + self._before_S[:rows]).max())

    def _grouped(self, repeats: int) -> PromptGroups:
        if repeats not in self._groups:
            rows = padded_rows(self.count)
            groups = group_rows(self._prompt_of_row, self._lengths, rows, repeats)
            self._groups[repeats] = groups.to(self._device)
        return self._groups[repeats]

    def leave(self, leaving: Leaving, awaited: int | None) -> None:
        """The last rows, and the last prompts, move into the slots that become free."""
        if leaving.holes:
            holes, movers = (torch.tensor(rows, device=self._device) for rows in (leaving.holes, leaving.movers))
            self._own.move(holes, movers, padded_tokens(int(self._place_S[: self.count].max())))
            for values_S in (self._place_S, self._before_S):
                values_S[holes] = values_S[movers]
        leaving.apply(self._prompt_of_row)
        self._forget_groups()
        self._drop_prompts(awaited)

    def _forget_groups(self) -> None:
        self._groups, self._sizes = {}, None
        self._views.forget_prompts()

    def _drop_prompts(self, awaited: int | None) -> None:
        alive = set(self._prompt_of_row)
        gone = [slot for slot, request in enumerate(self._requests) if slot not in alive and request != awaited]
        if not gone:
            return
        leaving = Leaving.of(len(self._requests), gone)
        if leaving.holes:
            holes, movers = (torch.tensor(slots, device=self._device) for slots in (leaving.holes, leaving.movers))
            longest = max(self._lengths[slot] for slot in leaving.movers)
            self._prompts.move(holes, movers, padded_tokens(longest))
            renamed = dict(zip(leaving.movers, leaving.holes, strict=True))
            self._prompt_of_row = [renamed.get(slot, slot) for slot in self._prompt_of_row]
        leaving.apply(self._requests)
        leaving.apply(self._lengths)
