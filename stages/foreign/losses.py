"""Losses of given rows: what of a row is trained, and how preferences count."""

from __future__ import annotations

from stages.foreign.concept import AXOLOTL, FACTORY, TRANSFORMERS, TRL, VERL, Concept, called

CONCEPTS = (
    Concept(
        {"train_on_inputs": AXOLOTL, "train_on_prompt": FACTORY},
        ("completion_only_loss",),
        note="true there is false here",
    ),
    Concept(
        called(AXOLOTL, "roles_to_train"),
        ("assistant_only_loss",),
        "assistant_only_loss: true",
        "what the assistant says, or all; no other choice of roles",
    ),
    Concept(
        called(AXOLOTL, "train_on_eos", "train_on_eot"),
        note="a turn or a completion that is trained is trained with its end token; there is nothing to set",
    ),
    Concept(
        called(FACTORY, "mask_history"),
        ("completion_only_loss",),
        "completion_only_loss: true",
        "a `normalize` of type prompt_completion makes the last turn the completion",
    ),
    Concept(called(FACTORY, "use_dft_loss"), ("loss_type",), "loss_type: dft", "of `sft`", "sft"),
    Concept(
        called(TRANSFORMERS, "label_smoothing_factor"),
        note="the cross-entropy has no smoothing; `label_smoothing` of `preference` is about pairs that may be the "
        "wrong way round",
    ),
    Concept(
        {"moe_aux_loss_coef": FACTORY, "router_aux_loss": VERL},
        ("router_aux_loss_coef",),
    ),
    # preferences
    Concept({"pref_beta": FACTORY, "rl_beta": AXOLOTL, "orpo_alpha": AXOLOTL}, ("beta",)),
    Concept({"pref_loss": FACTORY, "rl": AXOLOTL}, ("loss_type",)),
    Concept(
        {"dpo_label_smoothing": "Axolotl, LLaMA-Factory"},
        ("label_smoothing",),
    ),
    Concept(called(AXOLOTL, "dpo_use_weighting"), ("use_weighting",)),
    Concept(
        called(AXOLOTL, "dpo_norm_loss"),
        ("loss_type",),
        "loss_type: sigmoid_norm",
        "of `preference`",
        "preference",
    ),
    Concept(
        {"pref_ftx": FACTORY, "rpo_alpha": "older TRL, Axolotl"},
        ("loss_weights",),
        "loss_type: [sigmoid, sft], loss_weights: [1, WEIGHT]",
        "the second weight is this one",
        "preference",
    ),
    Concept(
        called(FACTORY, "pref_bco_weight"),
        ("loss_weights",),
        "loss_type: [sigmoid, bco_pair], loss_weights: [1, WEIGHT]",
        "the second weight is this one",
        "preference",
    ),
    Concept(
        {"kto_desirable_weight": AXOLOTL, "kto_chosen_weight": FACTORY},
        ("desirable_weight",),
        stage="unpaired_preference",
    ),
    Concept(
        {"kto_undesirable_weight": AXOLOTL, "kto_rejected_weight": FACTORY},
        ("undesirable_weight",),
        stage="unpaired_preference",
    ),
    # the reference
    Concept({"ref_model": TRL}, ("reference",)),
    Concept(
        {"sft_model_path": "TRL's PPO"},
        ("model",),
        note="which is the reference too, unless input `reference` is another",
    ),
    Concept(
        called(TRL, "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
        note="a reference that follows the model is of `preference` and `online_dpo`; elsewhere it stays as it was",
    ),
    Concept(
        called(TRL, "update_ref_model"),
        ("ref_model_follows",),
        "ref_model_follows: average",
        "beside sync_ref_model and weight_averaging",
        "preference",
    ),
    Concept(called(TRL, "ref_model_update_freq"), ("ref_model_sync_steps",), stage="preference"),
    Concept(
        called(TRL, "precompute_ref_log_probs", "precompute_ref_batch_size"),
        ("reference_logprobs",),
        note="the input, from a stage of that name; without it they are computed at the start",
    ),
    Concept(
        called(TRL, "disable_dropout"),
        note="always so, but for sft, which keeps the dropout of the model's configuration",
    ),
    Concept(
        called(TRL, "is_encoder_decoder"),
        note="models are decoders alone; leave it out",
    ),
)
