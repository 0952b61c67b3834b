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
    Concept({"lora_rank_pattern": COMMON}, ("rank_pattern",)),
    Concept({"lora_alpha_pattern": COMMON}, ("alpha_pattern",)),
    Concept({"peft_layers_to_transform": AXOLOTL}, ("layers_to_transform",)),
    Concept(
        {"exclude_modules": PEFT, "layers_pattern": PEFT, "peft_layers_pattern": AXOLOTL},
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
    Concept({"peft_init_lora_weights": AXOLOTL}, ("init_lora_weights",)),
    Concept(called(FACTORY, "pissa_init"), ("init_lora_weights",), "init_lora_weights: pissa"),
    Concept(called(FACTORY, "pissa_iter"), ("init_lora_weights",), "init_lora_weights: pissa_niter_16"),
    Concept(
        called(FACTORY, "pissa_convert"),
        note="an adapter that started as a part of the weights is always written for the weights as they came",
    ),
    Concept(
        called(PEFT, "loftq_config", "eva_config", "corda_config", "lora_ga_config", "mica_config") | {"loftq": COMMON},
        ("init_lora_weights",),
        note="starts that take no pass over data and no quantized weight: gaussian, orthogonal, olora, pissa",
    ),
    Concept(
        called(PEFT, "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication", "arrow_config")
        | called(PEFT, "peft_type", "velora_config", "monteclora_config", "kasa_config")
        | called(FACTORY, "oft_rank", "oft_block_size", "oft_target"),
        note="there is LoRA, with `use_rslora` and `use_dora`, and no other kind of adapter",
    ),
    Concept(
        called(PEFT, "num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text", "prefix_projection")
        | called(PEFT, "encoder_hidden_size", "encoder_reparameterization_type", "num_layers_prompt")
        | {"prompt_tuning": COMMON, "prefix_tuning": COMMON},
        note="virtual tokens are no tokens of a row, so rows that share a prompt cannot have them; there is LoRA",
    ),
    Concept(
        called(PEFT, "feedforward_modules") | {"ia3": COMMON},
        note="there is no IA3, whose vectors scale the outputs of layers; `use_dora` learns such scales beside LoRA",
    ),
    Concept(
        {"loraplus_lr_embedding": "Axolotl, LLaMA-Factory", "loraplus_embedding_lr": COMMON},
        ("loraplus_lr_ratio",),
        note="an embedding's factors have learning_rate",
    ),
    Concept({"lora_plus_ratio": COMMON, "lora_lr_ratio": COMMON}, ("loraplus_lr_ratio",)),
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
