"""Types of numbers, what saves memory or time, and how processes work together."""

from __future__ import annotations

from stages.foreign.concept import AXOLOTL, FACTORY, TRANSFORMERS, TRL, VERL, Concept, called

_KERNELS = "kernels that save time and memory are built in; there is nothing to switch on"

CONCEPTS = (
    Concept(
        called(TRANSFORMERS, "torch_dtype", "dtype")
        | {"bf16_full_eval": TRL, "bfloat16": AXOLOTL, "model_dtype": VERL},
        ("bf16",),
        "bf16: true",
        "training keeps float32 master weights, which is not the same as weights in bfloat16 alone: those are "
        "`pure_bf16: true` beside it; false is float32",
    ),
    Concept(
        {"fp16": TRL, "float16": AXOLOTL, "fp16_full_eval": TRL},
        ("bf16",),
        "bf16: true",
        "there is bfloat16 and float32, no float16",
    ),
    Concept(
        called("transformers, Axolotl", "tf32"),
        note="float32 is computed as float32; `bf16: true` is the faster way",
    ),
    Concept(
        called(AXOLOTL, "fp8", "fp8_enable_fsdp_float8_all_gather"),
        note="there is no float8; `bf16: true` is the fastest way",
    ),
    Concept(
        called(TRL, "cast_lm_head_to_fp32"),
        note="log-probabilities are computed in float32 from the logits on; on a GPU the head's product itself is in "
        "bfloat16 with `bf16: true`, in float32 without",
    ),
    Concept(called(TRL, "gradient_checkpointing_kwargs"), ("gradient_checkpointing",)),
    Concept(
        called("TRL, Axolotl", "activation_offloading"),
        ("gradient_checkpointing",),
        note="activations are computed again, and never moved to the CPU's memory",
    ),
    Concept({"use_unsloth_gc": FACTORY, "disable_gradient_checkpointing": FACTORY}, ("gradient_checkpointing",)),
    Concept(
        {"attn_implementation": TRL, "flash_attention": AXOLOTL, "flash_attn": FACTORY, "sdp_attention": AXOLOTL}
        | called(AXOLOTL, "xformers_attention", "flex_attention", "s2_attention")
        | {"shift_attn": FACTORY},
        note="attention is chosen by what the model and the machine have; there is nothing to set",
    ),
    Concept(
        called(TRL, "use_liger_kernel", "use_liger_loss")
        | {"enable_liger_kernel": FACTORY}
        | called(AXOLOTL, "liger_fused_linear_cross_entropy", "liger_rope", "liger_rms_norm", "liger_glu_activation")
        | called(AXOLOTL, "cut_cross_entropy", "chunked_cross_entropy", "unsloth_cross_entropy_loss"),
        note="losses that never hold all logits are built in; there is nothing to switch on",
    ),
    Concept(
        called(FACTORY, "use_unsloth")
        | called(AXOLOTL, "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
        | called(TRANSFORMERS, "liger_kernel_config")
        | called(VERL, "use_fused_kernels"),
        note=_KERNELS,
    ),
    Concept(
        called(TRANSFORMERS, "torch_compile", "torch_compile_backend", "torch_compile_mode")
        | called(VERL, "use_torch_compile"),
        note=f"nothing is compiled: {_KERNELS}",
    ),
    Concept(
        called(TRANSFORMERS, "torch_empty_cache_steps", "use_cache"),
        note="there is nothing to set; `posttrain plan --memory` says what a stage takes, and what makes it fit",
    ),
    Concept(
        called(TRANSFORMERS, "full_determinism"),
        note="deterministic algorithms are always on: the same run gives the same bits",
    ),
    Concept(
        {"deepspeed": "TRL, Axolotl, LLaMA-Factory"} | called(TRL, "fsdp") | called("TRL, Axolotl", "fsdp_config"),
        ("config",),
        "config: zero2",
        "also zero3, fsdp2, or an accelerate configuration file",
    ),
    Concept(
        called(TRANSFORMERS, "accelerator_config", "parallelism_config"),
        ("config",),
        "config: FILE",
        "an accelerate configuration file, or ddp, zero2, zero3, fsdp2",
    ),
    Concept(called(TRANSFORMERS, "use_cpu"), ("config",), "config: cpu"),
    Concept(
        {"local_rank": TRANSFORMERS, "nproc_per_node": "torchrun", "n_gpus_per_node": VERL},
        ("processes",),
        note="posttrain starts them",
    ),
    Concept(
        called(TRANSFORMERS, "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers")
        | called(TRANSFORMERS, "ddp_static_graph", "ddp_backend", "ddp_timeout"),
        note="processes sum their gradients once a step, without torch's wrapper; there is nothing to set",
    ),
    Concept(
        called(TRL, "ds3_gather_for_generation"),
        note="a sampler gets the weights of a sharded model by itself",
    ),
)
