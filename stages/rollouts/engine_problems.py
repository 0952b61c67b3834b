"""What is wrong with the settings of an engine: alone, and with those of sampling and training. Loads nothing heavy."""

from __future__ import annotations

from urllib.parse import urlsplit

from stages.rollouts.adapter_settings import adapter_problems
from stages.rollouts.engine_settings import EngineChoice, EngineConfig, EngineName
from stages.rollouts.requests import SamplingConfig
from stages.rollouts.structured import apart_problems

_APART: tuple[EngineName, ...] = ("vllm", "vllm_server")
_OWNERS: dict[str, tuple[EngineName, ...]] = {
    "dtype": _APART,
    "gpu_memory_utilization": _APART,
    "kv_cache_gib": _APART,
    "enforce_eager": _APART,
    "proof_interval": _APART,
    "sync_tolerance": _APART,
    "enable_sleep_mode": ("vllm",),
    "lora_sync": _APART,
    "tensor_parallel_size": _APART,
    "servers": ("vllm_server",),
    "devices": ("vllm_server",),
    "max_restarts": ("vllm_server",),
    "urls": ("vllm_server",),
    "weight_transfer": ("vllm_server",),
    "weights_folder": ("vllm_server",),
    "api_key_variable": ("vllm_server",),
    "max_staleness": ("vllm_server",),
    "in_flight_updates": ("vllm_server",),
    "start_timeout_seconds": ("vllm_server",),
    "request_timeout_seconds": ("vllm_server",),
}
"""Fields that only some engines have."""

_STARTED = ("servers", "devices", "max_restarts", "tensor_parallel_size", "gpu_memory_utilization", "kv_cache_gib")
"""Fields of servers that the stage starts."""


def engine_problems(config: EngineChoice, sampling: SamplingConfig | None) -> list[str]:
    """What is wrong with the engine's settings, alone and with those of sampling and training."""
    rollouts, fields = config.rollouts, type(config.rollouts).model_fields
    name = rollouts.engine
    problems = [
        f"rollouts.{field} is of engine {' or '.join(owners)}; {name} has none"
        for field, owners in _OWNERS.items()
        if field in fields and name not in owners and getattr(rollouts, field) != fields[field].default
    ]
    if not rollouts.is_apart:
        return problems
    if name == "vllm_server":
        problems += server_problems(rollouts)
    if rollouts.lora_sync == "adapter":
        problems += adapter_problems(config)
    if sampling is not None and sampling.min_p > 0 and sampling.top_p < 1:
        problems.append(
            f"min_p together with top_p: rollouts.engine {name} leaves out tokens by min_p first, the embedded engine "
            "by top_p; give one of the two"
        )
    problems += apart_problems(config, name)
    if getattr(config, "quantization", None) is not None:
        problems.append(
            f"quantization with rollouts.engine {name}: weights of few bits are not sent; use the embedded engine"
        )
    return problems


def server_problems(rollouts: EngineConfig) -> list[str]:
    """What is wrong with the settings of servers."""
    problems = _transfer_problems(rollouts) if rollouts.weight_transfer == "nccl" else []
    devices, count = rollouts.devices, rollouts.servers
    if isinstance(devices, tuple) and len(devices) != count:
        problems.append(f"rollouts.devices lists {len(devices)} for rollouts.servers {count}; give each its own")
    if isinstance(devices, str) and count > 1:
        problems.append(f"rollouts.devices is one text for {count} servers; give a list with one for each")
    if not rollouts.urls:
        return problems + [
            f"rollouts.{name} is for servers of rollouts.urls; there are none"
            for name in ("weights_folder", "api_key_variable")
            if getattr(rollouts, name) is not None
        ]
    problems += [
        f"rollouts.{name} is for servers that the stage starts; those of rollouts.urls are somebody else's"
        for name in _STARTED
        if getattr(rollouts, name) != EngineConfig.model_fields[name].default
    ]
    problems += [
        f"rollouts.urls has {url!r}; give the address alone, like http://127.0.0.1:8000 (a key comes from "
        "rollouts.api_key_variable)"
        for url in rollouts.urls
        if not _is_plain(url)
    ]
    if len(set(rollouts.urls)) < len(rollouts.urls):
        problems.append("rollouts.urls names a server twice")
    if rollouts.weight_transfer == "folder" and not (rollouts.weights_folder or "").startswith("/"):
        problems.append(
            "rollouts.urls needs rollouts.weights_folder, the absolute path of a folder that the stage and those "
            "servers both see: it is how new weights reach them"
        )
    return problems


def _transfer_problems(rollouts: EngineConfig) -> list[str]:
    """Of weights over NCCL."""
    problems = []
    if rollouts.weights_folder is not None:
        problems.append("rollouts.weights_folder is of weight_transfer folder; nccl has none")
    if not rollouts.urls and rollouts.devices is None:
        problems.append("rollouts.weight_transfer nccl needs rollouts.devices: no two of its processes share a GPU")
    if not rollouts.urls and rollouts.max_restarts:
        problems.append(
            "rollouts.weight_transfer nccl needs rollouts.max_restarts 0: a server that is started again in the middle "
            "of a generation has no weights of the moment, which only a folder keeps"
        )
    return problems


def _is_plain(url: str) -> bool:
    """Scheme, host and port, and maybe a path; no user, password or query, which may be secret."""
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
            and not (parts.username or parts.password or parts.query or parts.fragment)
        )
    except ValueError:
        return False
