"""One of two processes that share an engine of vLLM: what it answers is held to transformers in each of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.requests import SampleRequest, SamplingConfig
from stages.rollouts.vllm_engine import VllmEngine
from stages.training.adapter_weights import adapter_weights, served_adapter
from stages.training.whole_weights import whole_weights
from tests.vllm.models import served, teacher_forced, worst
from tests.vllm.test_engine import load

SETTINGS = EngineConfig(engine="vllm", kv_cache_gib=0.05, tensor_parallel_size=2)
WARM = SamplingConfig(max_completion_length=12, temperature=0.6)
NARROW = SamplingConfig(max_completion_length=12, top_k=3)
PROMPTS = {0: [[3, 4, 5], [6, 7], [8]], 1: [[9, 9, 4, 3]]}
"""By rank."""


@contextmanager
def opened(model: Any, settings: EngineConfig, store: Path) -> Iterator[VllmEngine]:
    """In a group of its own, which vLLM ends when it is closed."""
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=int(os.environ["RANK"]), world_size=2)
    engine = VllmEngine(model, settings, processes=2)
    yield engine
    engine.close()


def held_to(model: Any, engine: VllmEngine, prompts: list[list[int]]) -> None:
    """Sampled log-probabilities, and those of a pass over what filters left."""
    requests = [SampleRequest(prompt, tuple(range(8))) for prompt in prompts]
    sampled = engine.sample(requests, WARM)
    pairs = [(prompt, one) for prompt, group in zip(prompts, sampled, strict=True) for one in group]
    expected = [teacher_forced(model, prompt, one.token_ids, 0.6) for prompt, one in pairs]
    if pairs:
        assert worst([one.logprobs for _, one in pairs], expected) < 1e-4
    sampled = engine.sample(requests, NARROW)
    sequences = [(prompt, one.token_ids) for prompt, group in zip(prompts, sampled, strict=True) for one in group]
    found = engine.plain_logprobs(sequences)
    if pairs:
        assert worst(found, [teacher_forced(model, *sequence) for sequence in sequences]) < 1e-4


def adapted(model: Any) -> Any:
    torch.manual_seed(3)
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, settings).eval()


def parts(engine: VllmEngine) -> dict[str, tuple[int, ...]]:
    """Sizes of what this process holds of the weights."""
    (found,) = engine._llm.apply_model(
        lambda model: {name: tuple(one.shape) for name, one in model.named_parameters() if "embed_tokens" in name}
    )
    return found


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    mine = PROMPTS[rank]
    model, other, untied = (load(folder, name) for name in ("tied", "other", "untied"))
    with opened(served(folder / "tied"), SETTINGS, folder / "first") as engine:
        assert parts(engine) == {"model.embed_tokens.weight": (32, 64)}, parts(engine)  # 64 rows, filled up, in halves
        for weights in (model, other):
            engine.load(whole_weights(weights))
            held_to(weights, engine, mine)
            held_to(weights, engine, mine if rank == 1 else [])  # the first has nothing to ask
        adapters = adapted(model)
        engine.load(whole_weights(adapters.get_base_model()))
        held_to(adapters, engine, mine)
        assert engine.sample([], WARM) == []
    adapters = adapted(untied)
    alone = replace(served(folder / "untied"), adapter=served_adapter(adapters))
    settings = SETTINGS.model_copy(update={"lora_sync": "adapter"})
    with opened(alone, settings, folder / "second") as engine:
        engine.load(adapter_weights(adapters))
        held_to(adapters, engine, mine)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
