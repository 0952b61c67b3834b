"""What a sampler is asked for and what it gives back. Token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol, Self

from pydantic import Field, model_validator

from stages.rollouts.multi_turn.episode import Episode
from stages.rollouts.structured import StructuredConfig

Progress = Callable[[int, int], None]
"""(completions done, completions in all)"""


class SamplingConfig(StructuredConfig):
    """How the next token is drawn, and where a completion ends. Applied in this order: repetition_penalty, structured,
    temperature, top_k, top_p, min_p."""

    temperature: float = Field(1.0, ge=0.0)
    """Logits are divided by it; 0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Draw from the likeliest tokens that together have this probability; 1 draws from all."""
    top_k: int = Field(0, ge=0)
    """Draw from so many likeliest tokens (and those equal to the last of them); 0 draws from all."""
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    """Leave out tokens less likely than this fraction of the likeliest one; 0 leaves out none."""
    repetition_penalty: float = Field(1.0, gt=0.0)
    """Positive logits of tokens in prompt or completion are divided by it, negative ones multiplied (CTRL,
    arXiv:1909.05858); 1 changes none."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Tokens that end a completion, beside the model's own end tokens; they stay in it."""
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """A completion ends with the token that completes one of these in its text; its text stops before it."""
    max_completion_length: int = Field(256, ge=1)
    """A completion without an end token stops after so many tokens."""

    @model_validator(mode="after")
    def _a_form_has_its_own_end(self) -> Self:
        if self.structured is not None and (self.stop_token_ids or self.stop_strings):
            name = "stop_token_ids" if self.stop_token_ids else "stop_strings"
            raise ValueError(f"{name} and structured exclude each other: a completion ends where its form is complete")
        return self

    def filters(self) -> bool:
        """Whether the distribution is another one than the softmax of the model's logits at this temperature, or of
        those that `structured` allows."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0 or self.repetition_penalty != 1.0

    def restricts(self) -> bool:
        """Whether tokens are drawn from anything but the softmax of the model's logits at this temperature."""
        return self.filters() or self.structured is not None

    def changes_the_distribution(self) -> bool:
        """Whether `Completion.logprobs` are of another distribution than the model's own."""
        if self.temperature == 0.0:
            return self.repetition_penalty != 1.0 or self.structured is not None
        return self.temperature != 1.0 or self.restricts()


@dataclass(frozen=True)
class SampleRequest:
    """A prompt and one seed for every completion of it that is wanted."""

    prompt_ids: Sequence[int]
    seeds: tuple[int, ...]
    row_id: str | None = None
    """Names the prompt in messages."""
    limits: tuple[int, ...] | None = None
    """Most tokens of each completion, at most max_completion_length, 0 for an empty one; None: that for all."""


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt."""

    token_ids: list[int]
    """With the end token, if it ended by one."""
    logprobs: list[float]
    """Of each token, under the distribution it was drawn from (at temperature 0: under the model's own, after the
    repetition penalty and among what `structured` allows)."""
    finished: bool
    """Ended by an end token or a stop string, and not by its limit."""
    model_logprobs: list[float] = field(default_factory=list)
    """Of each token, under the model's own distribution: temperature 1, no filter, no penalty. The embedded sampler
    always gives them; vLLM where they are `logprobs`, else its `plain_logprobs` does."""
    free_logprobs: list[float] = field(default_factory=list)
    """Of each token that `structured` held to a form, among all tokens at the same temperature: what a trainer
    computes, too. NaN where the engine does not know (vLLM); empty: no form held it."""
    weight_versions: list[int] = field(default_factory=list)
    """Of each token: the optimizer steps behind the weights that made it; empty: those of the model in training."""
    loss_mask: list[bool] | None = None
    """Which tokens the model wrote; the others, answers of tools and environments, have 0 for a log-probability. None:
    all."""
    episode: Episode | None = None
    """Of a completion of several turns (`multi_turn`)."""

    @property
    def compared_logprobs(self) -> list[float]:
        """What a trainer's own are held to: a trainer knows no forms."""
        return self.free_logprobs or self.logprobs


class Sampler(Protocol):
    """The embedded engine, vLLM in process, a vLLM server."""

    def sample(
        self, requests: Sequence[SampleRequest], settings: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """For every request its completions, in the order of its seeds."""
        ...
