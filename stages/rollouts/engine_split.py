"""Whether an engine of vLLM can be split over training processes. Imports nothing heavy, for recipes are checked with
it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stages.rollouts.engine_settings import EngineConfig

_VOCABULARY_BLOCK = 64
"""vLLM fills a vocabulary up to a multiple of it."""


def launch_problems(rollouts: EngineConfig, processes: int) -> list[str]:
    """What is wrong with the number of processes that a stage with this engine is launched in."""
    together = rollouts.processes_per_engine
    if processes % together == 0:
        return []
    return [
        f"rollouts.tensor_parallel_size {together} with engine vllm: so many training processes share an engine, and "
        f"launch.processes {processes} is no multiple of it; change one of the two"
    ]


def model_problems(processes: int, *, heads: int, kv_heads: int, intermediate: int, vocabulary: int) -> list[str]:
    """What of a model cannot be split over so many processes as vLLM splits it: attention heads, the features of the
    feed-forward part and the rows of the vocabulary in equal parts, and key-value heads, or each is there as often as
    any other."""

    def uneven() -> Iterator[str]:
        if heads % processes:
            yield f"{heads} attention heads"
        if kv_heads % processes and processes % kv_heads:
            yield f"{kv_heads} key-value heads"
        if intermediate % processes:
            yield f"a feed-forward part of {intermediate} features"
        if (filled := -(-vocabulary // _VOCABULARY_BLOCK) * _VOCABULARY_BLOCK) % processes:
            yield f"a vocabulary of {vocabulary} tokens (for vLLM {filled})"

    return [
        f"rollouts.tensor_parallel_size {processes} with engine vllm: the model has {what}, of which {processes} "
        "processes cannot have equal parts; take a number that divides it"
        for what in uneven()
    ]


def config_problems(processes: int, values: Mapping[str, Any]) -> list[str]:
    """The same of a model's config.json. Nothing of a kind that names its sizes otherwise: vLLM itself refuses it."""
    heads = values.get("num_attention_heads")
    sizes: dict[str, Any] = {
        "heads": heads,
        "kv_heads": values.get("num_key_value_heads") or heads,
        "intermediate": values.get("moe_intermediate_size") or values.get("intermediate_size"),
        "vocabulary": values.get("vocab_size"),
    }
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        return []
    return model_problems(processes, **sizes)
