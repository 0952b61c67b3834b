"""What an engine with weights of its own is asked for; the embedded sampler computes with the trainer's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stages.rollouts.requests import Sampler

if TYPE_CHECKING:
    from torch import Tensor


ADAPTER_NAME = "posttrain-policy"
"""Of an adapter, among those that an engine applies."""


@dataclass(frozen=True)
class ServedAdapter:
    """The adapter that an engine applies, beside its weights."""

    rank: int
    """The largest of any layer."""
    settings: Mapping[str, Any]
    """As in adapter_config.json."""


@dataclass(frozen=True)
class ServedModel:
    """The model that an engine is opened for."""

    folder: Path
    """Configuration and weights, without adapters."""
    tokenizer: Path
    dtype: str
    """float32 or bfloat16."""
    vocabulary: int
    """Number of token ids that the model has an embedding for."""
    end_token_ids: tuple[int, ...]
    """Tokens that end a completion."""
    seed: int
    adapter: ServedAdapter | None = None
    """Given, the weights of the folder are kept, and those of the adapter alone are sent."""
    structured: bool = False
    """Whether completions are held to a form (`SamplingConfig.structured`)."""

    @property
    def adapter_name(self) -> str | None:
        """Under which completions are asked for; None: there is no adapter."""
        return None if self.adapter is None else ADAPTER_NAME


class Engine(Sampler, Protocol):
    """A sampler that computes with a copy of the trainer's weights."""

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take these weights, named as in a checkpoint, in the place of the present ones; what was computed with those
        (prefix cache) is forgotten. The head of a model that ties it to its embedding has to be among them.

        Of a model with an `adapter` they are the adapter's, named as in its folder.
        """
        ...

    def plain_logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Of (prompt, completion) pairs, neither empty: log-probabilities of the completion's tokens under the model's
        own distribution, temperature 1 and nothing left out."""
        ...

    def rest(self) -> bool:
        """Give memory free until the next `load`, where that is set; whether the weights are gone with it."""
        ...

    def close(self) -> None:
        """Give all free."""
        ...
