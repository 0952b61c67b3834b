"""Completions in the making: their tokens, random numbers and log-probabilities, and whether they are at an end.

B rows in the making, P rows of logits, S slots for them, T tokens of a completion, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.rollouts.draw import draw, uniforms
from stages.rollouts.form_masks import FormMasks
from stages.rollouts.requests import Completion, SamplingConfig
from stages.rollouts.rows import Leaving, Row
from stages.rollouts.stopping import Decode, completes


@dataclass(frozen=True)
class Ending:
    """What ends a completion before its limit."""

    token_ids: Tensor
    strings: Sequence[str] = ()
    decode: Decode | None = None


class Drafts:
    """Row b of everything belongs to `rows[b]`."""

    def __init__(
        self, settings: SamplingConfig, ending: Ending, longest: int, model: Any, form: FormMasks | None = None
    ) -> None:
        """`form`: what `structured` asks for."""
        self.rows: list[Row] = []
        self._settings, self._ending, self._longest, self._form = settings, ending, longest, form
        self._drawn_rows, self._slots_D = 0, torch.zeros(0, dtype=torch.long)
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        device = model.device
        self._tokens_ST = torch.zeros(0, longest, dtype=torch.long, device=device)
        self._uniforms_ST = torch.zeros(0, longest, dtype=torch.float64, device=device)
        self._logprobs_ST = torch.zeros(0, longest, dtype=torch.float64, device=device)
        self._model_logprobs_ST = torch.zeros(0, longest, dtype=torch.float64, device=device)
        self._free_logprobs_ST = torch.zeros(0, longest if form else 0, dtype=torch.float64, device=device)
        self._lengths_S = torch.zeros(0, dtype=torch.long, device=device)
        self._limits_S = torch.zeros(0, dtype=torch.long, device=device)
        self._fed_S = torch.zeros(0, dtype=torch.long, device=device)
        self._seen_SV = torch.zeros(0, self._vocabulary if self._penalizes else 0, dtype=torch.bool, device=device)

    @property
    def _penalizes(self) -> bool:
        return self._settings.repetition_penalty != 1.0

    def _state(self) -> Iterator[str]:
        return (name for name in vars(self) if name.endswith(("_S", "_ST", "_SV")))

    def enter(self, rows: Sequence[Row]) -> None:
        """New rows, behind those that are there."""
        first, device = len(self.rows), self._fed_S.device
        self.rows += rows
        if self._form is not None:
            self._form.enter(len(rows))
        if len(self.rows) > len(self._fed_S):
            for name in self._state():
                value = getattr(self, name)
                setattr(self, name, torch.cat([value, value.new_zeros(len(self.rows) - len(value), *value.shape[1:])]))
        new = slice(first, len(self.rows))
        self._uniforms_ST[new] = uniforms([row.seed for row in rows], self._longest).to(device)
        self._lengths_S[new] = 0
        self._limits_S[new] = torch.tensor([row.limit for row in rows], device=device)
        self._fed_S[new] = torch.tensor([row.prompt_ids[-1] for row in rows], device=device)
        if self._penalizes:
            self._seen_SV[new] = False
            for place, row in enumerate(rows, start=first):
                self._seen_SV[place, torch.tensor(list(row.prompt_ids), device=device)] = True

    def fed_B(self) -> Tensor:
        """The last token of every row, which the model is to be fed next."""
        return self._fed_S[: len(self.rows)]

    def extend(self, logits_PV: Tensor) -> list[int]:
        """Draw a token for every row; returns the rows that are now at their end."""
        rows = len(self.rows)
        slots_D = self._drawing()
        places_D = self._lengths_S[slots_D]
        seen_DV = self._seen_SV[slots_D] if self._penalizes else None
        allowed_DV = (
            None if self._form is None else self._form.allowed_BV(self.rows).to(slots_D.device).expand(len(slots_D), -1)
        )
        numbers_D = self._uniforms_ST[slots_D, places_D]
        drawn = draw(logits_PV[: len(slots_D)], numbers_D, self._settings, seen_DV, allowed_DV)
        slots_B, places_B, tokens_B = slots_D[:rows], places_D[:rows], drawn.tokens_B[:rows]
        self._tokens_ST[slots_B, places_B] = tokens_B
        self._logprobs_ST[slots_B, places_B] = drawn.logprobs_B[:rows].double()
        if self._settings.changes_the_distribution():
            self._model_logprobs_ST[slots_B, places_B] = drawn.model_logprobs_B[:rows].double()
        if self._form is not None:
            assert drawn.free_logprobs_B is not None
            self._free_logprobs_ST[slots_B, places_B] = drawn.free_logprobs_B[:rows].double()
            self._form.take(tokens_B.tolist())
        if self._penalizes:
            self._seen_SV[slots_B, tokens_B] = True
        self._fed_S[:rows] = tokens_B
        self._lengths_S[:rows] += 1
        at_end_B = torch.isin(tokens_B, self._ending.token_ids) | (self._lengths_S[:rows] == self._limits_S[:rows])
        gone: list[int] = at_end_B.nonzero()[:, 0].tolist()
        return sorted({*gone, *self._at_strings()}) if self._ending.strings else gone

    def _drawing(self) -> Tensor:
        """Slots of the rows; a single row twice: of one alone torch sums in another order than of one among others."""
        rows = len(self.rows)
        if rows != self._drawn_rows:
            self._drawn_rows = rows
            self._slots_D = torch.arange(max(2, rows), device=self._fed_S.device).clamp(max=rows - 1)
        return self._slots_D

    def _at_strings(self) -> Iterator[int]:
        return (row for row in range(len(self.rows)) if self._is_at_string(row))

    def _is_at_string(self, row: int) -> bool:
        assert self._ending.decode is not None
        token_ids = self._tokens_ST[row, : int(self._lengths_S[row])].tolist()
        return completes(token_ids, self._ending.strings, self._ending.decode)

    def finish(self, gone: Sequence[int]) -> Iterator[tuple[Row, Completion]]:
        """The completions of these rows. Raises StageError where a log-probability is not a number."""
        for place in gone:
            row, length = self.rows[place], int(self._lengths_S[place])
            tokens, logprobs = (
                values_ST[place, :length].tolist() for values_ST in (self._tokens_ST, self._logprobs_ST)
            )
            model_logprobs = logprobs
            if self._settings.changes_the_distribution():
                model_logprobs = self._model_logprobs_ST[place, :length].tolist()
            if any(value != value for value in logprobs):
                raise StageError(
                    f"the model's logits for prompt {row.request} are not numbers (NaN): its weights are damaged, or "
                    "training diverged; look at the loss and gradient norm of the steps before"
                )
            ended = bool(torch.isin(self._tokens_ST[place, length - 1], self._ending.token_ids))
            finished = ended or (bool(self._ending.strings) and self._is_at_string(place))
            free = self._free_logprobs_ST[place, :length].tolist()
            yield row, Completion(tokens, logprobs, finished, model_logprobs, free)

    def leave(self, gone: Sequence[int]) -> Leaving:
        """Let rows go; the last ones take their places."""
        leaving = Leaving.of(len(self.rows), gone)
        if self._form is not None:
            self._form.leave(leaving)
        if leaving.holes:
            device = self._fed_S.device
            holes, movers = (torch.tensor(rows, device=device) for rows in (leaving.holes, leaving.movers))
            for name in self._state():
                value = getattr(self, name)
                value[holes] = value[movers]
        for hole, mover in zip(leaving.holes, leaving.movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[leaving.left :]
        return leaving
