"""Rows with transformers' own cache, for models whose attention cannot be replaced: a batch at a time, padded on the
left, every row with a copy of its prompt's keys.

B rows in the making, R rows of the batch as it is in memory, n prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from stages.rollouts.kv_cache import STATES, cache_name, keep_rows, reserved_cache
from stages.rollouts.rows import Leaving, Row

FINISHED_SHARE = 8
"""Finished rows leave memory once they are one in so many: leaving copies the cache of those that stay."""


class PaddedRows:
    """`most_tokens` bounds rows x (longest prompt + longest completion) of a batch."""

    def __init__(self, model: Any, *, most_tokens: int, completion_tokens: int, pad_token_id: int) -> None:
        self._model, self._pad_id = model, pad_token_id
        self._most_tokens, self._completion_tokens = most_tokens, completion_tokens
        self._cache, self._cache_name = DynamicCache(), cache_name(model)
        self._visible_RT: Tensor | None = None
        """0 at a prompt's padding, else 1, up to the last token to come; None: nothing is padded."""
        self._lengths_R = torch.zeros(0, dtype=torch.long)
        """Tokens so far, without padding: the position of the next one."""
        self._stands: list[int] = []
        """Where each row stands in memory."""
        self._seen = 0
        """Tokens in memory of every row, with padding; a cache of states alone does not count them."""

    @property
    def count(self) -> int:
        """B."""
        return len(self._stands)

    def room_for(self, waiting: Sequence[Row]) -> int:
        """A whole batch, once the one before is done. Prompts of one token, of which nothing is computed before, are
        among themselves."""
        if self.count or not waiting:
            return 0
        longest = max(len(row.prompt_ids) for row in waiting)
        most = max(1, self._most_tokens // (longest + self._completion_tokens))
        alone = len(waiting[0].prompt_ids) == 1
        rows = 0
        for row in waiting[:most]:
            if (len(row.prompt_ids) == 1) != alone:
                break
            rows += 1
        return rows

    def enter(self, rows: Sequence[Row]) -> None:
        """Compute every prompt once; repeat its keys and values for its completions."""
        prompts: dict[int, Sequence[int]] = {}
        for row in rows:
            prompts.setdefault(row.request, row.prompt_ids[:-1])
        order = {request: index for index, request in enumerate(prompts)}
        prompt_R = torch.tensor([order[row.request] for row in rows], device=self._model.device)
        width = max(map(len, prompts.values()))
        self._cache = reserved_cache(self._model.config, width + self._completion_tokens)
        lengths_n = torch.tensor([len(ids) for ids in prompts.values()], device=self._model.device)
        self._visible_RT, self._seen = None, width
        if width:
            visible_nT = self._compute(list(prompts.values()), width, width - lengths_n)
            keep_rows(self._cache, prompt_R)
            self._visible_RT = None if visible_nT is None else visible_nT.index_select(0, prompt_R)
        self._lengths_R = lengths_n.index_select(0, prompt_R)
        self._stands = list(range(len(rows)))

    def _compute(self, prompts: list[Sequence[int]], width: int, pads_n: Tensor) -> Tensor | None:
        device = self._model.device
        ids_nT = torch.tensor([[self._pad_id] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
        # without padding no mask is given, and attention takes its faster way
        visible_nT = None
        if bool(pads_n.any()):
            visible_nT = (torch.arange(width + self._completion_tokens, device=device) >= pads_n[:, None]).long()
        self._model(
            input_ids=ids_nT,
            attention_mask=None if visible_nT is None else visible_nT[:, :width],
            position_ids=(torch.arange(width, device=device) - pads_n[:, None]).clamp(min=0),
            **{self._cache_name: self._cache},
            use_cache=True,
            logits_to_keep=1,
        )
        return visible_nT

    def step(self, tokens_B: Tensor) -> Tensor:
        """[B, V], or [2, V] of a single row."""
        stands_B = torch.tensor(self._stands, device=tokens_B.device)
        tokens_R = tokens_B.new_zeros(len(self._lengths_R)).index_copy_(0, stands_B, tokens_B)
        self._seen += 1
        # a model of states alone sees no padding again, and would take the mask of all tokens for that of this one
        mask_RT = None if self._visible_RT is None or self._cache_name == STATES else self._visible_RT[:, : self._seen]
        logits_RV: Tensor = self._model(
            input_ids=tokens_R[:, None],
            attention_mask=mask_RT,
            position_ids=self._lengths_R[:, None],
            **{self._cache_name: self._cache},
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self._lengths_R += 1
        if len(stands_B) == 1:
            stands_B = stands_B.expand(2)
        return logits_RV.index_select(0, stands_B)

    def leave(self, leaving: Leaving, awaited: int | None) -> None:
        """Rows leave memory a few together."""
        leaving.apply(self._stands)
        held = len(self._lengths_R)
        if self.count and (held - self.count) * FINISHED_SHARE >= held:
            kept_B = torch.tensor(self._stands, device=self._model.device)
            keep_rows(self._cache, kept_B)
            self._lengths_R = self._lengths_R.index_select(0, kept_B)
            if self._visible_RT is not None:
                self._visible_RT = self._visible_RT.index_select(0, kept_B)
            self._stands = list(range(self.count))
