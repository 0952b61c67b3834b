"""vLLM, in the training process or as servers."""

from __future__ import annotations

from stages.foreign.concept import TRL, VERL, Concept, called

CONCEPTS = (
    Concept(called(TRL, "use_vllm"), ("rollouts",), "rollouts: {engine: vllm}"),
    Concept(
        called(TRL, "vllm_mode"),
        ("rollouts",),
        "rollouts: {engine: vllm}",
        "colocate is vllm, server is vllm_server",
    ),
    Concept(
        called(TRL, "vllm_server_base_url", "vllm_server_host", "vllm_server_port"),
        ("urls",),
        'urls: ["http://HOST:PORT"]',
        "with engine: vllm_server",
    ),
    Concept(called(TRL, "vllm_gpu_memory_utilization"), ("gpu_memory_utilization",)),
    Concept(
        {"vllm_tensor_parallel_size": TRL, "tensor_model_parallel_size": VERL},
        ("tensor_parallel_size",),
    ),
    Concept({"vllm_enable_sleep_mode": TRL, "free_cache_engine": VERL}, ("enable_sleep_mode",)),
    Concept(called(TRL, "vllm_server_timeout"), ("start_timeout_seconds",)),
    Concept(called(TRL, "weight_sync_timeout"), ("request_timeout_seconds",)),
    Concept(
        called(TRL, "vllm_max_model_length"),
        note="it is what the model's config.json says; `max_length` and `max_completion_length` bound rows",
    ),
    Concept(
        called(TRL, "vllm_model_impl"),
        note="vLLM chooses its implementation of a model; there is nothing to set",
    ),
    Concept(
        called(TRL, "vllm_group_port"),
        note="weights go by files or, with `weight_transfer: nccl`, over a port that is free",
    ),
)
