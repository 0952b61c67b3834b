"""What a sampler is asked for and what it gives back. Token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field

from stages.stage import Config

Progress = Callable[[int, int], None]
"""(completions done, completions in all)"""


class SamplingConfig(Config):
    """How the next token is drawn. Filters apply in this order: temperature, top_k, top_p, min_p."""

    temperature: float = Field(1.0, ge=0.0)
    """Logits are divided by it; 0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Draw from the likeliest tokens that together have this probability; 1 draws from all."""
    top_k: int = Field(0, ge=0)
    """Draw from so many likeliest tokens (and those equal to the last of them); 0 draws from all."""
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    """Leave out tokens less likely than this fraction of the likeliest one; 0 leaves out none."""
    max_completion_length: int = Field(256, ge=1)
    """A completion without an end token stops after so many tokens."""


@dataclass(frozen=True)
class SampleRequest:
    """A prompt and one seed for every completion of it that is wanted."""

    prompt_ids: Sequence[int]
    seeds: tuple[int, ...]
    row_id: str | None = None
    """Names the prompt in messages."""


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt."""

    token_ids: list[int]
    """With the end token, if it ended by one."""
    logprobs: list[float]
    """Of each token, under the distribution it was drawn from (at temperature 0: under the model's own)."""
    finished: bool
    """Ended by an end token, and not by `max_completion_length`."""


class Sampler(Protocol):
    """The embedded engine, vLLM in process, a vLLM server."""

    def sample(
        self, requests: Sequence[SampleRequest], settings: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """For every request its completions, in the order of its seeds."""
        ...
