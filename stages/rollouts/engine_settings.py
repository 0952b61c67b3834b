"""Which engine samples completions, and what it is given. Imports nothing heavy: recipes are checked with it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from stages.rollouts.requests import SamplingConfig
from stages.stage import Config, operational

EngineName = Literal["embedded", "vllm", "vllm_server"]

PYTHON_VARIABLE = "POSTTRAIN_VLLM_PYTHON"
"""Environment variable with the interpreter that has vLLM, where the stage's has not (`launch.vllm_python`)."""
_APART: tuple[EngineName, ...] = ("vllm", "vllm_server")
_OWNERS: dict[str, tuple[EngineName, ...]] = {
    "dtype": _APART,
    "gpu_memory_utilization": _APART,
    "kv_cache_gib": _APART,
    "enforce_eager": _APART,
    "proof_interval": _APART,
    "sync_tolerance": _APART,
    "enable_sleep_mode": ("vllm",),
    "tensor_parallel_size": ("vllm_server",),
    "devices": ("vllm_server",),
    "start_timeout_seconds": ("vllm_server",),
    "request_timeout_seconds": ("vllm_server",),
}
"""Fields that only some engines have."""

CORRECTION = "token_truncate"
"""importance_sampling_mode where an engine computes apart from the trainer and the recipe says nothing."""


class EngineConfig(Config):
    """What samples, and how its weights are kept the trainer's."""

    engine: EngineName = "embedded"
    """embedded: the model in training itself; vllm: an engine of vLLM in the training process; vllm_server: a server of
    vLLM that the stage starts and stops."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What vLLM computes in; null: as the stage does (`bf16`)."""
    gpu_memory_utilization: float = operational(0.3, gt=0, lt=1)
    """Share of a GPU's memory for vLLM's weights and key-value cache together."""
    kv_cache_gib: float = operational(1.0, gt=0)
    """GiB of vLLM's key-value cache on a CPU."""
    enable_sleep_mode: bool = operational(False)
    """Give vLLM's memory free between generations, where it shares a GPU with the training; engine vllm only."""
    enforce_eager: bool = operational(True)
    """Neither compile the model nor capture CUDA graphs: starts sooner, samples more slowly on GPUs."""
    tensor_parallel_size: int = operational(1, ge=1)
    """GPUs that one server spreads the model over."""
    devices: str | None = operational(None)
    """The server's CUDA_VISIBLE_DEVICES, such as "2,3"; null: those of the stage."""
    proof_interval: int = operational(10, ge=1)
    """After the first sync of weights and then after every so many, the trainer computes the log-probabilities of fresh
    completions too, and stops where they differ."""
    sync_tolerance: float | None = operational(None, gt=0)
    """Largest difference of a token's log-probability that the proof lets pass, in nats; null: 1e-3 where both compute
    in float32, else 1."""
    start_timeout_seconds: float = operational(600.0, gt=0)
    """How long a server may take to answer for the first time."""
    request_timeout_seconds: float = operational(600.0, gt=0)
    """How long a server may take over one completion, waiting included, or over new weights."""

    @property
    def is_apart(self) -> bool:
        """Whether the engine has weights of its own."""
        return self.engine != "embedded"

    def computes_in(self, bf16: bool) -> str:
        """The engine's type, beside a trainer in bfloat16 or not."""
        return self.dtype or ("bfloat16" if bf16 else "float32")

    def tolerance(self, bf16: bool) -> float:
        """`sync_tolerance`, or what rounding explains beside such a trainer."""
        exact = self.computes_in(bf16) == "float32" and not bf16
        return self.sync_tolerance or (1e-3 if exact else 1.0)


class EngineChoice(Config):
    """Of stages whose completions another engine can sample."""

    rollouts: EngineConfig = EngineConfig()
    """What samples the completions: `{engine: vllm}` and what it is given; by default the model in training itself."""


class CorrectedEngineChoice(EngineChoice):
    """Of stages that can correct for an engine that computes a little differently."""

    @model_validator(mode="after")
    def _correct_where_apart(self) -> Self:
        """A correction is on where a recipe with such an engine says nothing of it; null switches it off."""
        if self.rollouts.is_apart and "importance_sampling_mode" not in self.model_fields_set:
            object.__setattr__(self, "importance_sampling_mode", CORRECTION)
        return self


def engine_problems(config: EngineChoice, sampling: SamplingConfig | None) -> list[str]:
    """What is wrong with the engine's settings, alone and with those of sampling and training."""
    rollouts, fields = config.rollouts, EngineConfig.model_fields
    name = rollouts.engine
    problems = [
        f"rollouts.{field} is of engine {' or '.join(owners)}; {name} has none"
        for field, owners in _OWNERS.items()
        if name not in owners and getattr(rollouts, field) != fields[field].default
    ]
    if not rollouts.is_apart:
        return problems
    if sampling is not None and sampling.min_p > 0 and sampling.top_p < 1:
        problems.append(
            f"min_p together with top_p: rollouts.engine {name} leaves out tokens by min_p first, the embedded engine "
            "by top_p; give one of the two"
        )
    if getattr(config, "quantization", None) is not None:
        problems.append(
            f"quantization with rollouts.engine {name}: weights of 4 bits are not sent; use the embedded engine"
        )
    return problems
