"""Sampling from the geometric mixture of two models, token by token.

B rows in the making, P rows of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.rollouts.requests import SampleRequest, SamplingConfig
from stages.rollouts.room import BATCH_TOKENS
from stages.rollouts.rows import Leaving, Row, Rows
from stages.rollouts.sampler import EmbeddedSampler

Other = Callable[[], AbstractContextManager[Any]]
"""`with other() as model:` inside, the model computes as the other one; it may be the first model's own object."""


class MixtureSampler(EmbeddedSampler):
    """The next token has a probability in proportion to model^(1 - mixture_coef) other^mixture_coef.

    Munos et al., arXiv:2312.00886: the opponent of Nash-MD, taken token by token, as a mixture of whole completions
    would need their normalizer. The logits that temperature, filters and penalty change, and that
    `Completion.model_logprobs` are of, are the mixed ones. Both models hold keys and values, within one budget.
    """

    def __init__(
        self, model: Any, other: Other, mixture_coef: float, *, max_batch_tokens: int = BATCH_TOKENS, **keywords: Any
    ) -> None:
        super().__init__(model, max_batch_tokens=max_batch_tokens // 2, **keywords)
        self._other, self._mixture_coef = other, mixture_coef
        with other() as one:
            self._beside = EmbeddedSampler(one, max_batch_tokens=max_batch_tokens // 2, **keywords)

    @contextmanager
    def _engine(self, waiting: Collection[Row]) -> Iterator[Rows]:
        with super()._engine(waiting) as own, self._beside._engine(waiting) as other:
            yield MixedRows(own, other, self._other, self._mixture_coef)
        self.unshared = self.unshared or self._beside.unshared

    def _check(self, requests: Sequence[SampleRequest], settings: SamplingConfig) -> None:
        super()._check(requests, settings)
        self._beside._check(requests, settings)


class MixedRows:
    """Rows that two models are run on."""

    def __init__(self, own: Rows, other: Rows, other_model: Other, mixture_coef: float) -> None:
        self._own, self._other = own, other
        self._other_model, self._mixture_coef = other_model, mixture_coef

    def room_for(self, waiting: Sequence[Row]) -> int:
        """How many may enter both."""
        return min(self._own.room_for(waiting), self._other.room_for(waiting))

    def enter(self, rows: Sequence[Row]) -> None:
        """Compute their prompts twice."""
        self._own.enter(rows)
        with self._other_model():
            self._other.enter(rows)

    def step(self, tokens_B: Tensor) -> Tensor:
        """[P, V], in float32 at least. Raises StageError for models of unequal vocabularies."""
        own_PV = self._own.step(tokens_B)
        with self._other_model():
            other_PV = self._other.step(tokens_B)
        if own_PV.shape[1] != other_PV.shape[1]:
            raise StageError(
                f"the policy has {own_PV.shape[1]} tokens, the reference {other_PV.shape[1]}: what they would say next "
                "cannot be mixed; give a reference with the vocabulary of input model"
            )
        rows, wide = min(len(own_PV), len(other_PV)), torch.promote_types(own_PV.dtype, torch.float32)
        # two products and a sum, each rounded by itself: a fused one would depend on a row's place in the batch
        own_PV = own_PV[:rows].to(wide) * (1 - self._mixture_coef)
        return own_PV + other_PV[:rows].to(wide) * self._mixture_coef

    def leave(self, leaving: Leaving, awaited: int | None) -> None:
        """From both."""
        self._own.leave(leaving, awaited)
        self._other.leave(leaving, awaited)
