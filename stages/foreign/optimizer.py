"""The optimizer, its learning rate, and what bounds a gradient."""

from __future__ import annotations

from stages.foreign.concept import AXOLOTL, COMMON, FACTORY, TRANSFORMERS, TRL, VERL, Concept, called

CONCEPTS = (
    Concept({"lr": AXOLOTL}, ("learning_rate",)),
    Concept({"lr_scheduler": AXOLOTL}, ("lr_scheduler_type",)),
    Concept(called(VERL, "lr_warmup_steps"), ("warmup_steps",)),
    Concept(called(VERL, "lr_warmup_steps_ratio"), ("warmup_ratio",)),
    Concept(
        {"lr_scheduler_kwargs": TRL, "cosine_min_lr_ratio": AXOLOTL, "min_lr": COMMON, "min_lr_rate": "transformers"}
        | {"lr_end": "transformers"},
        ("min_lr_ratio",),
        note="the share of learning_rate at which the fall ends; besides, warmup_stable_decay has lr_decay_ratio and "
        "lr_decay_type, cosine_with_restarts lr_num_cycles, polynomial lr_power, inverse_sqrt lr_timescale",
    ),
    Concept(called(TRANSFORMERS, "num_cycles"), ("lr_num_cycles",)),
    Concept(called(TRANSFORMERS, "decay_type"), ("lr_decay_type",)),
    Concept(called(TRANSFORMERS, "timescale"), ("lr_timescale",)),
    Concept(
        called(AXOLOTL, "lr_groups", "embedding_lr", "embedding_lr_scale"),
        note="all weights of a model have one learning_rate",
    ),
    Concept(
        {"gradient_clipping": "DeepSpeed", "gradient_clip_val": "Lightning", "clip_grad_norm": COMMON}
        | {"grad_clip": VERL},
        ("max_grad_norm",),
    ),
    Concept(called(TRL, "adam_beta1", "adam_beta2"), ("betas",)),
    Concept(called(COMMON, "optimizer"), ("optim",)),
    Concept(called(FACTORY, "use_muon"), ("optim",), "optim: muon"),
    Concept(
        called(FACTORY, "use_galore", "galore_target", "galore_rank", "galore_update_interval", "galore_scale")
        | called(FACTORY, "use_apollo", "apollo_target", "apollo_rank", "apollo_scale", "apollo_update_interval")
        | called(FACTORY, "use_badam", "badam_mode", "badam_switch_mode", "badam_switch_interval", "use_adam_mini")
        | called(TRANSFORMERS, "optim_target_modules"),
        note="this optimizer is not there; `optim: adafactor`, `adamw_8bit` or `muon` need less memory than adamw",
    ),
    Concept(
        called(TRL, "optim_args"),
        note="every optimizer has settings of its own: betas and adam_epsilon, muon_momentum",
    ),
    Concept(called(TRL, "data_seed"), ("seed",)),
    Concept(
        {"use_ema": "diffusers", "ema_decay": "diffusers", "bema": TRL, "bema_callback": TRL},
        ("weight_averaging",),
        "weight_averaging: {kind: ema, decay: 0.999}",
        "or kind bema, with the names of TRL's callback; the output has the averaged weights",
        "sft",
    ),
    Concept(
        called(TRANSFORMERS, "average_tokens_across_devices"),
        note="a step's loss is always divided once, by its items over all processes",
    ),
)
