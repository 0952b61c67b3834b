"""What the embedded sampler holds: keys and values of the completions in the making, and the logits they are drawn
from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stages.training.memory import Phase, phase
from stages.training.memory_activations import Layers, passing_bytes
from stages.training.memory_allocator import ALLOCATOR_SHARE
from stages.training.memory_shape import ModelShape
from stages.training.memory_training import Setup

_FLOAT = 4
_BATCH_TOKENS = 65_536
"""As EmbeddedSampler's default, which imports torch and cannot be asked; a test compares them."""
_LOGITS_AT_ONCE = 4
"""Those before a step, after it, less their maximum, and their exponentials."""
_SORTED_BYTES = 48
"""A token of the vocabulary, where the likeliest are sorted out: values, order, and integers of their sums."""


@dataclass(frozen=True)
class Sampled:
    """What is sampled at once."""

    completions: int
    prompt: int
    """Tokens of the longest prompt."""
    completion: int
    """Tokens of the longest completion."""
    per_prompt: int = 1
    sorts: bool = False
    """top_p below 1."""


def sampling(shape: ModelShape, setup: Setup, asked: Sampled, *, number: int, resident: Mapping[str, float]) -> Phase:
    """Sampling with a model that is `resident`, with all that stays beside it. `number`: bytes of one in the cache."""
    length = asked.prompt + asked.completion
    rows = min(asked.completions, max(1, _BATCH_TOKENS // length))
    cache = rows * length * shape.layers * 2 * shape.keys * number
    # rows that are done leave layer by layer: one layer is there twice meanwhile
    moved = 2 * cache / shape.layers
    logits = rows * shape.vocabulary * (_FLOAT * _LOGITS_AT_ONCE + (_SORTED_BYTES if asked.sorts else 0))
    prompts = -(-rows // asked.per_prompt)
    prefill = passing_bytes(Layers(shape, number, setup.device), prompts * asked.prompt)
    slack = 1 + ALLOCATOR_SHARE[setup.device]
    parts = {**resident, "sampler": slack * (cache + moved + logits), "activations": slack * prefill}
    return phase("sampling", parts, setup)
