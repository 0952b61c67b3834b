"""What engines of vLLM hold on a CPU, against numbers derived by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stages.rl import Config, memory
from stages.rollouts.engine_settings import EngineConfig
from stages.training.memory_engine import (
    IN_PROCESS_BYTES,
    IN_PROCESS_WORD_BYTES,
    SERVER_BYTES,
    SERVER_WORD_BYTES,
    Asked,
    EngineMemory,
    engine_memory,
)
from stages.training.memory_phase import PROCESS_BYTES, Phase, worst
from stages.training.memory_request import Request
from stages.training.memory_sampling import Sampled
from stages.training.memory_shape import ModelShape
from stages.training.memory_training import Setup
from tests.training.test_memory import HAND

# HAND has 1992 parameters, 800 of them its embedding, which is its head too; both are there once more: 3592
WEIGHTS = 3592 * 4
HALF_A_GIB = 2**29
PROCESS, SERVER = IN_PROCESS_BYTES + 100 * IN_PROCESS_WORD_BYTES, SERVER_BYTES + 100 * SERVER_WORD_BYTES
SAMPLED = Sampled(completions=16, prompt=10, completion=6, per_prompt=8)


def request(processes: int = 1, **config: Any) -> Request:
    values = {"rewards": ["exact_match"], "train_batch_size": 16, "num_generations": 8, **config}
    return Request(Config.model_validate(values), {"model": HAND}, frozenset({"model"}), Setup(processes))


def held(engine: str, shape: ModelShape = HAND, processes: int = 1, reads: int = 0, **settings: Any) -> EngineMemory:
    given = EngineConfig(engine=engine, kv_cache_gib=0.5, **settings)  # type: ignore[arg-type]
    return engine_memory(request(processes), Asked(shape, given, SAMPLED, sent=1_000.0, reads=reads))


def test_in_process() -> None:
    found = held("vllm")
    assert found.resting == WEIGHTS + HALF_A_GIB + PROCESS
    # prompts of 160 tokens pass a feed-forward part: streams of 4 x 8 and 2 x 4 numbers, three of 16
    assert found.sampling - found.resting == pytest.approx(1.12 * 160 * 4 * (32 + 8 + 48))
    assert held("vllm", dtype="bfloat16").resting == WEIGHTS / 2 + HALF_A_GIB + PROCESS
    assert held("vllm", tensor_parallel_size=2).resting == WEIGHTS / 2 + HALF_A_GIB + PROCESS


def test_of_a_large_vocabulary_the_logits_are_most_of_what_comes_and_goes() -> None:
    """Of 16 completions, three times in float32, 1.92 MB; of a row of 40 tokens that is read, 4.8 MB. Where few are
    sampled, taking an embedding and a head of 320 kB in the place of others is more."""
    shape = replace(HAND, vocabulary=10_000)
    for reads, most in ((0, 16 * 10_000 * 4 * 3), (40, 40 * 10_000 * 4 * 3)):
        found = held("vllm", shape, reads=reads)
        assert found.sampling - found.resting == pytest.approx(1.12 * most)
    wide = replace(shape, hidden=1_000)
    found = held("vllm", wide)
    assert found.sampling - found.resting == pytest.approx(1.12 * 2 * 10_000 * 1_000 * 4)


def test_servers() -> None:
    """Each has weights, cache and processes; the files with the weights lie there once; processes share all of it."""
    one, three = held("vllm_server"), held("vllm_server", servers=3)
    assert one.resting == 1_000 + WEIGHTS + HALF_A_GIB + SERVER
    assert three.resting == 1_000 + 3 * (WEIGHTS + HALF_A_GIB + SERVER)
    # 16 completions on three servers: 6 prompts of 10 tokens at most, or both processes' 32: 11
    assert three.sampling - three.resting == pytest.approx(3 * 1.12 * 60 * 4 * 88)
    both = held("vllm_server", processes=2, servers=3)
    assert both.resting == three.resting / 2
    assert both.sampling - both.resting == pytest.approx(3 * 1.12 * 110 * 4 * 88 / 2)
    wide = held("vllm_server", tensor_parallel_size=2)  # on a CPU: two halves of the weights, two whole caches
    assert wide.resting == 1_000 + WEIGHTS + 2 * HALF_A_GIB + SERVER


@pytest.mark.parametrize(
    ("engine", "gib", "tokens", "rows"),
    [
        ("vllm", 24, 8_192, 256),
        ("vllm", 80, 16_384, 1024),
        ("vllm_server", 24, 2_048, 256),
        ("vllm_server", 80, 8_192, 1024),
        ("vllm_server", 180, 16_384, 1024),
    ],
)
def test_on_a_gpu_its_share_has_to_hold_the_largest_pass_that_it_allows(
    engine: str, gib: int, tokens: int, rows: int
) -> None:
    """Weights, a row of 64 tokens, and a pass: in the layers, or the logits of a vocabulary of 1,000,000."""
    setup = Setup(1, device="cuda", device_bytes=gib * 2**30)
    given = EngineConfig(engine=engine, gpu_memory_utilization=0.5)  # type: ignore[arg-type]
    for vocabulary, most in ((100, tokens * 4 * 88), (1_000_000, rows * 1_000_000 * 4 * 3)):
        shape = replace(HAND, vocabulary=vocabulary)
        found = engine_memory(replace(request(), setup=setup), Asked(shape, given, SAMPLED))
        assert found.resting == found.sampling == gib * 2**29
        (own,) = found.own
        assert own.room == gib * 2**29
        assert own.total == 4 * shape.parameters + 64 * 2 * 2 * 4 * 4 + most


def test_it_is_there_in_every_phase_and_the_embedded_sampler_is_not() -> None:
    plain = {one.name: one for one in memory(request())}
    found = {one.name: one for one in memory(request(rollouts={"engine": "vllm", "kv_cache_gib": 0.5}))}
    assert list(found) == ["sampling", "training step", "vLLM's cache"]
    assert found["training step"].total - plain["training step"].total == WEIGHTS + HALF_A_GIB + PROCESS
    assert "sampler" in plain["sampling"].parts and "sampler" not in found["sampling"].parts
    state = plain["sampling"].parts["weights"] + plain["sampling"].parts["optimizer"] + PROCESS_BYTES["cpu"]
    assert found["sampling"].total == state + found["sampling"].parts["engine"]
    # one row of 64 tokens, which is a block of 128: keys and values of 4 numbers in 2 layers
    assert found["vLLM's cache"] == Phase("vLLM's cache", {"engine": 128 * 2 * 2 * 4 * 4}, HALF_A_GIB)


def test_weights_that_wait_are_those_that_are_sent() -> None:
    """Of two generations ahead: weights with the head under its own name, twice."""
    ahead = {"engine": "vllm_server", "kv_cache_gib": 0.5}
    waiting, none = (memory(request(rollouts={**ahead, "max_staleness": count})) for count in (2, 0))
    assert waiting[1].parts["sampler"] == 2 * 4 * (1992 + 800) and "sampler" not in none[1].parts
    assert none[1].parts["engine"] == 4 * (1992 + 800) + WEIGHTS + HALF_A_GIB + SERVER


def test_a_phase_with_a_room_of_its_own_decides_where_it_does_not_fit() -> None:
    large, own = Phase("step", {"weights": 90.0}), Phase("cache", {"engine": 10.0}, room=20.0)
    assert worst([large, own], 100.0) == large
    tight = replace(own, room=5.0)
    assert worst([large, tight], 100.0) == tight  # twice its room
    assert worst([large, tight], 30.0) == large  # three times the limit
