"""What engines of vLLM hold: one in each process of a stage, or servers that the stage starts, here or on other GPUs.

On a GPU vLLM takes the share that it is given (`gpu_memory_utilization`), whatever it needs of it. On a CPU it holds
its weights, a cache of the size that it is given (`kv_cache_gib`), and what its processes need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.requests import SamplingConfig
from stages.training.memory_activations import Layers, passing_bytes
from stages.training.memory_allocator import ALLOCATOR_SHARE
from stages.training.memory_phase import Phase, phase
from stages.training.memory_request import Request
from stages.training.memory_sampling import Sampled
from stages.training.memory_shape import ModelShape
from stages.training.memory_training import Setup

_FLOAT = 4
_GIB = 2**30
_BLOCK_TOKENS = 128
"""Tokens of a block of vLLM's cache on a CPU."""
_BATCH_TOKENS = {"vllm": 4096, "vllm_server": 2048}
_ROWS = {"vllm": 256, "vllm_server": 128}
"""Most tokens of a pass and completions at a time, as vLLM sets them on a CPU; a prompt is read in one pass."""
_LARGE_GPU, _LARGEST_GPU = 70 * _GIB, 160 * _GIB
"""From here on vLLM sets other numbers."""
_LOGITS_AT_ONCE = 3
"""Those of a pass, what they are drawn by, and their log-probabilities."""
_KEPT_TWICE = 2
"""Embedding and head as they were, beside how they are laid out for products on a CPU."""
IN_PROCESS_BYTES = 260_000_000
"""vLLM's libraries in a stage's process on a CPU, beside what the stage has loaded anyway. It and the next three as
measured (`tests.benchmarks.engine_memory`, vLLM 0.32)."""
IN_PROCESS_WORD_BYTES = 1_200
"""Of its tokenizer, a token of the vocabulary."""
SERVER_BYTES = 1_700_000_000
"""The processes of one server on a CPU without weights and cache."""
SERVER_WORD_BYTES = 3_000
"""Of their tokenizers."""
SHARE = "vLLM's share"


@dataclass(frozen=True)
class Asked:
    """What an engine is opened for."""

    shape: ModelShape
    settings: EngineConfig
    sampled: Sampled
    sent: float = 0.0
    """Bytes of the weights that it is sent through files, which lie in memory."""
    reads: int = 0
    """Tokens of the longest row whose every token's log-probability it is asked for."""


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one process of the stage, and phases of what has a place of its own."""

    resting: float
    """While others compute."""
    sampling: float
    """While it computes."""
    own: tuple[Phase, ...] = ()


def engine_memory(request: Request, asked: Asked) -> EngineMemory:
    """Of an engine apart. What is somebody else's is none of ours."""
    settings, setup = asked.settings, request.setup
    if settings.urls:
        return EngineMemory(0.0, 0.0)
    if takes_a_share(settings, setup):
        return _on_gpu(request, asked)
    if setup.device == "cuda":  # servers in the host's memory, which is not what is predicted there
        return EngineMemory(0.0, 0.0)
    cache = settings.kv_cache_gib * _GIB
    row = Phase("vLLM's cache", {"engine": _longest_row(asked, request, _BLOCK_TOKENS)}, cache)
    if settings.engine == "vllm":
        held = _weights(asked, request, on_cpu=True) + cache
        held += IN_PROCESS_BYTES + IN_PROCESS_WORD_BYTES * asked.shape.vocabulary
        return EngineMemory(held, held + _coming_and_going(asked, request), (row,))
    return _on_this_machine(request, asked, row)


def _on_this_machine(request: Request, asked: Asked, row: Phase) -> EngineMemory:
    """Servers on a CPU, which the stage's processes share the memory with; a server's own processes have each a part of
    the weights and a whole cache."""
    settings, setup = asked.settings, request.setup
    parts = settings.tensor_parallel_size
    each = parts * (_weights(asked, request, on_cpu=True) + settings.kv_cache_gib * _GIB)
    each += SERVER_BYTES + SERVER_WORD_BYTES * asked.shape.vocabulary
    together = -(-asked.sampled.completions * setup.processes // settings.servers)
    theirs = replace(asked, sampled=replace(asked.sampled, completions=together))
    resting = asked.sent + settings.servers * each
    sampling = resting + settings.servers * _coming_and_going(theirs, request)
    return EngineMemory(resting / setup.processes, sampling / setup.processes, (row,))


def rollout_engine(request: Request, sampled: Sampled, *, sent: float = 0.0) -> EngineMemory | None:
    """Of `rollouts`, opened for input `model`; None: the stage's own model samples."""
    settings: EngineConfig | None = getattr(request.config, "rollouts", None)
    if settings is None or not settings.is_apart:
        return None
    plain = not isinstance(request.config, SamplingConfig) or not request.config.restricts()
    plain = plain and request.config.structured is None
    reads = 0 if plain else sampled.prompt + sampled.completion  # the proof asks for all of them then
    return engine_memory(request, Asked(request.model, settings, sampled, sent, reads))


def takes_a_share(settings: EngineConfig, setup: Setup) -> bool:
    """Whether the engine finds a GPU."""
    if settings.engine == "vllm":
        return setup.device == "cuda"
    return setup.device_bytes is not None and settings.devices != ""


def sampling_apart(engine: EngineMemory, setup: Setup, resident: Mapping[str, float]) -> Phase:
    """Sampling beside what is `resident`."""
    return phase("sampling", {**resident, "engine": engine.sampling}, setup)


def beside(engine: EngineMemory, one: Phase) -> Phase:
    """A phase of the stage in which the engine rests."""
    return one.with_parts({"engine": one.parts.get("engine", 0.0) + engine.resting})


def _on_gpu(request: Request, asked: Asked) -> EngineMemory:
    settings, setup = asked.settings, request.setup
    assert setup.device_bytes is not None
    share = settings.gpu_memory_utilization * setup.device_bytes
    needed = _weights(asked, request, on_cpu=False) + _longest_row(asked, request, 1)
    needed += _tried(asked, request, setup.device_bytes)
    own = Phase(SHARE, {"engine": needed}, share)
    if settings.engine == "vllm":
        return EngineMemory(0.0 if settings.enable_sleep_mode else share, share, (own,))
    if settings.devices is None:
        together = settings.servers * share
        return EngineMemory(together, together, (own,)) if setup.device == "cuda" else EngineMemory(0.0, 0.0, (own,))
    crowd = Phase("vLLM's GPU", {"engine": _most_on_one(settings) * share}, setup.device_bytes)
    return EngineMemory(0.0, 0.0, (own, crowd))


def _most_on_one(settings: EngineConfig) -> int:
    """Servers on the GPU that most of them name."""
    named = [name for number in range(settings.servers) for name in str(settings.devices_of(number)).split(",")]
    return max(named.count(name) for name in named)


def _bytes_of(asked: Asked, request: Request) -> int:
    return 2 if asked.settings.computes_in(bool(request.config.bf16)) == "bfloat16" else _FLOAT


def _weights(asked: Asked, request: Request, *, on_cpu: bool) -> float:
    """Of one of the processes that share them. On a CPU linear parts are laid out anew for their products; embedding
    and head, each even where they are one, stay as they were besides."""
    shape = asked.shape
    again = _KEPT_TWICE * shape.embedding_parameters if on_cpu else 0
    return (shape.parameters + again) * _bytes_of(asked, request) / asked.settings.tensor_parallel_size


def _longest_row(asked: Asked, request: Request, block: int) -> float:
    """Keys and values of a row as long as the model takes them: with a smaller cache vLLM does not start."""
    shape, tokens = asked.shape, -(-asked.shape.context // block) * block
    cache = tokens * shape.layers * 2 * shape.keys * _bytes_of(asked, request)
    return cache / asked.settings.tensor_parallel_size


def _coming_and_going(asked: Asked, request: Request) -> float:
    """On a CPU: what passes and draws take, or embedding and head that are taken in the place of those before."""
    loading = _KEPT_TWICE * asked.shape.embedding_parameters * _bytes_of(asked, request)
    working = _working(asked, request, _BATCH_TOKENS[asked.settings.engine], _ROWS[asked.settings.engine])
    return (1 + ALLOCATOR_SHARE["cpu"]) * max(loading, working)


def _working(asked: Asked, request: Request, batch_tokens: int, most_rows: int) -> float:
    """Of what the stage asks for."""
    sampled = asked.sampled
    together = min(sampled.completions * sampled.prompt, max(batch_tokens, asked.shape.context))
    return _pass(asked, request, together, max(min(sampled.completions, most_rows), asked.reads))


def _tried(asked: Asked, request: Request, device_bytes: int) -> float:
    """Of the largest pass that vLLM allows: on a GPU it begins with one, and gives the cache what that leaves."""
    if device_bytes >= _LARGEST_GPU:
        tokens, rows = 16_384, 1024
    elif device_bytes >= _LARGE_GPU:
        tokens, rows = {"vllm": 16_384, "vllm_server": 8_192}[asked.settings.engine], 1024
    else:
        tokens, rows = {"vllm": 8_192, "vllm_server": 2_048}[asked.settings.engine], 256
    return _pass(asked, request, tokens, max(rows, asked.reads))


def _pass(asked: Asked, request: Request, tokens: int, rows: int) -> float:
    """Inside the layers, or with the logits of so many rows behind them, whichever is more."""
    shape = asked.shape
    layers = passing_bytes(Layers(shape, _bytes_of(asked, request), request.setup.device), tokens)
    return float(max(layers, rows * shape.vocabulary * _FLOAT * _LOGITS_AT_ONCE))
