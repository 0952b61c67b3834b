"""What the embedded sampler holds: keys and values of the completions in the making, and the logits they are drawn
from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from stages.rollouts.room import (
    BATCH_TOKENS,
    PACKED_BYTES,
    PACKED_STEPS,
    PROMPT_TOKENS_AT_ONCE,
    padded_rows,
    room_for,
)
from stages.training.memory_activations import Layers, passing_bytes
from stages.training.memory_allocator import ALLOCATOR_SHARE
from stages.training.memory_phase import Phase, phase
from stages.training.memory_request import Request
from stages.training.memory_shape import ModelShape
from stages.training.memory_training import Setup

_FLOAT = 4
_LOGITS_AT_ONCE = 3
"""Those of a step, less their maximum, and their exponentials."""
_FORM_BYTES = 6
"""A token of the vocabulary, where a form allows some: the logits that are left, and flags, twice."""
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
    of_form: bool = False
    """`structured`."""
    beside: ModelShape | None = None
    """A second model whose logits are mixed in; both share the tokens that may be held."""


def sampling(shape: ModelShape, setup: Setup, asked: Sampled, *, number: int, resident: Mapping[str, float]) -> Phase:
    """Sampling with a model that is `resident`, with all that stays beside it. `number`: bytes of one in the cache."""
    models = [shape] if asked.beside is None else [shape, asked.beside]
    room = room_for(
        completions=asked.completions,
        per_prompt=asked.per_prompt,
        prompt=asked.prompt,
        completion=asked.completion,
        most_tokens=BATCH_TOKENS // len(models),
    )
    cache = sum(room.tokens * one.layers * 2 * one.keys * number for one in models)
    rows, at_once = padded_rows(room.rows), _LOGITS_AT_ONCE + len(models) - 1
    besides = (_SORTED_BYTES if asked.sorts else 0) + (_FORM_BYTES if asked.of_form else 0)
    logits = rows * shape.vocabulary * (_FLOAT * at_once + besides)
    together = min(room.prompts * room.prompt_tokens, max(room.prompt_tokens, PROMPT_TOKENS_AT_ONCE))
    passing = passing_bytes(Layers(shape, number, setup.device), max(rows, together))
    slack = 1 + ALLOCATOR_SHARE[setup.device]
    packed = sum(_packed_bytes(one, setup, number) for one in models) if asked.completion >= PACKED_STEPS else 0
    parts = {**resident, "sampler": slack * (cache + logits + packed), "activations": slack * passing}
    return phase("sampling", parts, setup)


def sampling_at_most(request: Request, asked: Sampled, *, number: int, resident: Mapping[str, float]) -> Phase:
    """As `sampling`, by the policy of a stage that may sample held-out prompts too: as many completions at once, of
    more prompts or of fewer."""
    asked = replace(asked, of_form=request.config.structured is not None)
    several = [asked]
    if "eval_dataset" in request.wired:
        several.append(replace(asked, per_prompt=request.config.eval_num_generations, beside=None))
    phases = [sampling(request.model, request.setup, one, number=number, resident=resident) for one in several]
    return max(phases, key=lambda one: one.total)


def _packed_bytes(shape: ModelShape, setup: Setup, number: int) -> int:
    """Of the linear layers' packed copies (`stages.training.linear.packed_weights`). An Intel's CPU makes none."""
    if setup.device != "cpu" or number != _FLOAT:
        return 0
    plain = shape.linear_shapes[:4] if shape.experts else shape.linear_shapes
    of_layer = sum(inside * outside for inside, outside, _ in plain)
    return min(PACKED_BYTES, number * (shape.layers * of_layer + shape.embedding_parameters))
