"""Which engine samples completions, and what it is given. Imports nothing heavy: recipes are checked with it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from stages.rollouts.structured import StructuredConfig
from stages.stage import Config, operational

EngineName = Literal["embedded", "vllm", "vllm_server"]

PYTHON_VARIABLE = "POSTTRAIN_VLLM_PYTHON"
"""Environment variable with the interpreter that has vLLM, where the stage's has not (`launch.vllm_python`)."""
CORRECTION = "token_truncate"
"""importance_sampling_mode where an engine computes apart from the trainer and the recipe says nothing."""


class EngineConfig(Config):
    """What samples, and how its weights are kept the trainer's."""

    engine: EngineName = "embedded"
    """embedded: the model in training itself; vllm: an engine of vLLM in the training process, of several one in each;
    vllm_server: servers of vLLM that the stage starts and stops, or that `urls` names."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What vLLM computes in; null: as the stage does (`bf16`)."""
    gpu_memory_utilization: float = operational(0.3, gt=0, lt=1)
    """Share of a GPU's memory for vLLM's weights and key-value cache together."""
    kv_cache_gib: float = operational(1.0, gt=0)
    """GiB of vLLM's key-value cache on a CPU."""
    enable_sleep_mode: bool = operational(False)
    """Give vLLM's memory free between generations, where it shares a GPU with the training; engine vllm only."""
    lora_sync: Literal["merged", "adapter"] = operational("merged")
    """How what LoRA has learnt reaches vLLM. merged: with all weights of the model; adapter: alone, which sends little,
    and vLLM applies it at every token, which is slower than merged."""
    enforce_eager: bool = operational(True)
    """Neither compile the model nor capture CUDA graphs: starts sooner, samples more slowly on GPUs."""
    tensor_parallel_size: int = operational(1, ge=1)
    """GPUs that one server spreads the model over; of engine vllm, the training processes that share one engine, each
    with a part of its weights."""
    servers: int = operational(1, ge=1)
    """How many servers the stage starts; all have the same weights and share the prompts."""
    devices: str | tuple[str, ...] | None = operational(None)
    """The server's CUDA_VISIBLE_DEVICES, such as "2,3", of several servers a list of them; null: those of the stage."""
    max_restarts: int = operational(3, ge=0)
    """How often each of these servers, should it end, is started again in one run of the stage."""
    urls: tuple[str, ...] = operational(())
    """Servers that somebody else runs, such as "http://127.0.0.1:8000", in the place of some that the stage starts."""
    weight_transfer: Literal["folder", "nccl"] = operational("folder")
    """How new weights reach servers. folder: as files, in shared memory where they are on this machine; nccl: from GPU
    to GPU, by vLLM's own interface, which takes vLLM beside the trainer, too."""
    weights_folder: str | None = operational(None)
    """Absolute path of a folder that those servers see as well; new weights reach them through files there."""
    api_key_variable: str | None = operational(None)
    """The environment variable with the key that those servers ask for; null: they ask for none."""
    proof_interval: int = operational(10, ge=1)
    """After the first sync of weights and then after every so many, the trainer computes the log-probabilities of fresh
    completions too, and stops where they differ."""
    sync_tolerance: float | None = operational(None, gt=0)
    """Largest difference of a token's log-probability that the proof lets pass, in nats; null: 1e-3 where both compute
    in float32, else 1."""
    start_timeout_seconds: float = operational(600.0, gt=0)
    """How long a server may take to answer for the first time, or after a restart."""
    request_timeout_seconds: float = operational(600.0, gt=0)
    """How long a server may take over one completion, waiting included, or over new weights."""

    @property
    def is_apart(self) -> bool:
        """Whether the engine has weights of its own."""
        return self.engine != "embedded"

    @property
    def changes_in_flight(self) -> bool:
        """Whether a completion may go on with other weights than it began with."""
        return False

    @property
    def processes_per_engine(self) -> int:
        """Training processes that share an engine inside them."""
        return self.tensor_parallel_size if self.engine == "vllm" else 1

    def devices_of(self, server: int) -> str | None:
        """The CUDA_VISIBLE_DEVICES of one of the servers, counted from 0."""
        return self.devices[server] if isinstance(self.devices, tuple) else self.devices

    def computes_in(self, bf16: bool) -> str:
        """The engine's type, beside a trainer in bfloat16 or not."""
        return self.dtype or ("bfloat16" if bf16 else "float32")

    def tolerance(self, bf16: bool) -> float:
        """`sync_tolerance`, or what rounding explains beside such a trainer."""
        exact = self.computes_in(bf16) == "float32" and not bf16
        return self.sync_tolerance or (1e-3 if exact else 1.0)


class OverlappedEngineConfig(EngineConfig):
    """What samples while the trainer trains, too."""

    max_staleness: int = Field(default=0, ge=0)
    """Generations that are sampled while earlier ones are trained on: each with the weights from before the one that is
    so many places earlier. 0: with the weights of the moment, while the trainer waits."""
    in_flight_updates: bool = False
    """Give vLLM new weights in the middle of those completions: they go on with them, over what was computed with the
    weights before (PipelineRL, arXiv:2509.19128). No token is of older ones than with max_staleness alone."""

    @property
    def changes_in_flight(self) -> bool:
        """Whether a completion may go on with other weights than it began with."""
        return self.in_flight_updates


class EngineChoice(StructuredConfig):
    """Of stages whose completions another engine can sample."""

    rollouts: EngineConfig = EngineConfig()
    """What samples the completions: `{engine: vllm}` and what it is given; by default the model in training itself."""


class OverlappedEngineChoice(EngineChoice):
    """Of stages that can learn from completions of older weights."""

    rollouts: OverlappedEngineConfig = OverlappedEngineConfig()
    """What samples the completions: `{engine: vllm}` and what it is given; by default the model in training itself."""


class CorrectedEngineChoice(OverlappedEngineChoice):
    """Of stages that can correct for an engine that computes a little differently, or with older weights."""

    @model_validator(mode="after")
    def _correct_where_apart(self) -> Self:
        """A correction is on where a recipe with such an engine says nothing of it, but where it has none of a form
        (`apart_problems`); null switches it off."""
        is_on = self.rollouts.is_apart and self.structured is None
        if is_on and "importance_sampling_mode" not in self.model_fields_set:
            object.__setattr__(self, "importance_sampling_mode", CORRECTION)
        return self
