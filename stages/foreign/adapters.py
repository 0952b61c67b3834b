"""Adapters, what is trained beside or without them, and weights of few bits."""

from __future__ import annotations

from stages.foreign.concept import AXOLOTL, COMMON, FACTORY, PEFT, TRL, Concept, called

CONCEPTS = (
    Concept({"lora_rank": FACTORY, "r": PEFT}, ("lora_r",)),
    Concept(
        {"peft_config": TRL, "use_peft": TRL, "adapter": AXOLOTL, "finetuning_type": FACTORY},
        ("lora_r",),
        note="with it adapters are trained, without it all weights",
    ),
    Concept({"lora_target": FACTORY, "target_modules": PEFT}, ("lora_target_modules",)),
    Concept(called(AXOLOTL, "lora_target_linear"), ("lora_target_modules",), "lora_target_modules: all-linear"),
    Concept(
        {"lora_target_parameters": "TRL, Axolotl", "target_parameters": PEFT},
        ("lora_target_modules",),
        "lora_target_modules: all-linear",
        "experts are among these",
    ),
    Concept({"lora_dropout_p": COMMON}, ("lora_dropout",)),
    Concept(
        {"lora_modules_to_save": "TRL, Axolotl", "additional_target": FACTORY},
        ("modules_to_save",),
    ),
    Concept(
        {"trainable_token_indices": PEFT, "lora_fix_untrained_tokens": AXOLOTL},
        ("modules_to_save",),
        "modules_to_save: [embed_tokens]",
        "all rows of the embedding, not some",
    ),
    Concept(
        called(PEFT, "rank_pattern", "alpha_pattern"),
        note="all adapters have one rank and one scale: lora_r and lora_alpha",
    ),
    Concept(
        called(PEFT, "layers_to_transform", "layers_pattern", "exclude_modules")
        | called(AXOLOTL, "peft_layers_to_transform", "peft_layers_pattern"),
        ("lora_target_modules",),
        note="names that may hold the layer, such as layers.3.self_attn.q_proj",
    ),
    Concept(
        called(PEFT, "task_type", "fan_in_fan_out") | {"lora_task_type": TRL, "model_type": AXOLOTL},
        note="it follows from the stage and from its input model",
    ),
    Concept(
        called(PEFT, "bias", "lora_bias"),
        note="beside adapters no bias is trained; `modules_to_save` names modules that are trained whole",
    ),
    Concept(
        called(PEFT, "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
        | {"peft_init_lora_weights": AXOLOTL}
        | called(FACTORY, "pissa_init", "pissa_iter", "pissa_convert"),
        note="adapters begin as in LoRA's paper, one factor random and the other 0; there is no other start",
    ),
    Concept(
        called(PEFT, "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication", "arrow_config")
        | called(PEFT, "peft_type", "velora_config", "monteclora_config", "kasa_config")
        | called(FACTORY, "oft_rank", "oft_block_size", "oft_target"),
        note="there is LoRA, with `use_rslora` and `use_dora`, and no other kind of adapter",
    ),
    Concept(
        called("Axolotl, LLaMA-Factory", "loraplus_lr_ratio")
        | {"loraplus_lr_embedding": FACTORY, "loraplus_embedding_lr": COMMON},
        note="both factors of an adapter have one learning_rate; there is no LoRA+",
    ),
    Concept(
        {"adapter_name_or_path": FACTORY, "lora_model_dir": AXOLOTL},
        ("model",),
        note="an adapter that is wired in there is trained on",
    ),
    Concept(
        called(FACTORY, "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")
        | called(AXOLOTL, "unfrozen_parameters"),
        note="trained are all weights, or with `lora_r` the adapters and `modules_to_save`; nothing else is frozen",
    ),
    Concept(
        called(FACTORY, "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model"),
        note="models are of text alone, and trained whole or through adapters (`lora_r`)",
    ),
    Concept(
        {"load_in_4bit": "TRL, Axolotl", "bnb_4bit_quant_type": "transformers", "quantization_bit": FACTORY}
        | {"quantization_config": "transformers"}
        | called(FACTORY, "quantization_type", "quantization_method"),
        ("quantization",),
        "quantization: nf4",
        "or fp4, or int8; with lora_r",
    ),
    Concept({"load_in_8bit": "TRL, Axolotl"}, ("quantization",), "quantization: int8", "with lora_r"),
    Concept(
        {"use_bnb_nested_quant": TRL, "bnb_4bit_use_double_quant": "transformers", "double_quantization": FACTORY},
        ("quantization",),
        note="its 4 bits always have their scales in 8 bits, as in QLoRA's paper",
    ),
    Concept({"bnb_4bit_compute_dtype": "transformers"}, ("bf16",), note="products are in the type of the passes"),
    Concept(
        {"bnb_4bit_quant_storage": TRL},
        note="weights of few bits are kept as bytes: another type is for slicing them, which `quantization` excludes",
    ),
    Concept(
        {"llm_int8_threshold": "transformers", "llm_int8_skip_modules": "transformers"},
        note="with `quantization: int8` no state is rounded, so none is an outlier, and the head stays as it is",
    ),
)
