"""What TRL, Axolotl, LLaMA-Factory and others call things, and what does the same here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

TRL, AXOLOTL, FACTORY, VERL, COMMON = "TRL", "Axolotl", "LLaMA-Factory", "verl", "common usage"


@dataclass(frozen=True)
class Concept:
    """One thing that a recipe may want, under the names that it has elsewhere."""

    called: Mapping[str, str]
    """Name elsewhere -> whose it is."""
    fields: tuple[str, ...] = ()
    """Fields, inputs or launch settings that do it here, of which a stage has one; none: `note` says what is done."""
    written: str = ""
    """How a recipe has it, where that is more than the name of the field."""
    note: str = ""


def _called(whose: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, whose)


CONCEPTS = (
    # steps and batches
    Concept(
        _called(TRL, "per_device_train_batch_size"),
        ("train_batch_size",),
        note="items of one optimizer step over all processes",
    ),
    Concept(
        _called(TRL, "gradient_accumulation_steps"),
        ("train_batch_size",),
        note="accumulation follows from micro_batch_tokens",
    ),
    Concept(
        _called(TRL, "generation_batch_size"),
        ("steps_per_generation",),
        note="a generation is of train_batch_size x steps_per_generation completions",
    ),
    Concept({"micro_batch_size": AXOLOTL}, ("micro_batch_tokens",)),
    Concept({"num_epochs": AXOLOTL, "epochs": COMMON}, ("num_train_epochs",)),
    Concept({"total_episodes": "TRL's PPO"}, ("max_steps",), note="completions; here optimizer steps"),
    Concept(
        {"sequence_len": AXOLOTL, "cutoff_len": FACTORY, "max_seq_length": "TRL before 0.20, Unsloth"}
        | {"max_prompt_length": "TRL before 0.25"},
        ("max_length",),
    ),
    Concept(
        _called(AXOLOTL, "sample_packing", "pad_to_sequence_len", "multipack_real_batches")
        | _called(FACTORY, "neat_packing")
        | _called(TRL, "padding_free", "group_by_length"),
        note="passes are always packed and never padded, and no row sees another; `packing` of `sft` is about steps of "
        "equal size",
    ),
    # the optimizer
    Concept({"lr": AXOLOTL}, ("learning_rate",)),
    Concept({"lr_scheduler": AXOLOTL}, ("lr_scheduler_type",)),
    Concept(
        {"lr_scheduler_kwargs": TRL, "cosine_min_lr_ratio": AXOLOTL, "min_lr": COMMON, "min_lr_rate": "transformers"},
        ("min_lr_ratio",),
        note="the share of learning_rate at which the fall ends; warmup_stable_decay has lr_decay_ratio besides",
    ),
    Concept(
        {"gradient_clipping": "DeepSpeed", "gradient_clip_val": "Lightning", "clip_grad_norm": COMMON},
        ("max_grad_norm",),
    ),
    Concept(_called(TRL, "adam_beta1", "adam_beta2"), ("betas",)),
    Concept(_called(COMMON, "optimizer"), ("optim",)),
    Concept(
        _called(TRL, "optim_args"),
        note="every optimizer has settings of its own: betas and adam_epsilon, muon_momentum",
    ),
    Concept(_called(TRL, "data_seed"), ("seed",)),
    # numbers and memory
    Concept(
        {"torch_dtype": "transformers", "dtype": "transformers", "bf16_full_eval": TRL, "pure_bf16": FACTORY},
        ("bf16",),
        "bf16: true",
        "or false for float32",
    ),
    Concept(
        {"fp16": TRL, "float16": AXOLOTL, "fp16_full_eval": TRL},
        ("bf16",),
        "bf16: true",
        "there is bfloat16 and float32, no float16",
    ),
    Concept(
        _called(TRL, "gradient_checkpointing_kwargs") | {"activation_offloading": AXOLOTL}, ("gradient_checkpointing",)
    ),
    Concept(
        {"attn_implementation": TRL, "flash_attention": AXOLOTL, "flash_attn": FACTORY, "sdp_attention": AXOLOTL}
        | _called(AXOLOTL, "xformers_attention", "flex_attention"),
        note="attention is chosen by what the model and the machine have; there is nothing to set",
    ),
    Concept(
        _called(TRL, "use_liger_kernel", "use_liger_loss")
        | {"enable_liger_kernel": FACTORY}
        | _called(AXOLOTL, "liger_fused_linear_cross_entropy", "liger_rope", "liger_rms_norm", "liger_glu_activation"),
        note="losses that never hold all logits are built in; there is nothing to switch on",
    ),
    Concept(
        _called(TRL, "dataset_num_proc", "dataloader_num_workers")
        | {"dataset_processes": AXOLOTL, "preprocessing_num_workers": FACTORY},
        note="there are no data workers to set",
    ),
    Concept(
        {"deepspeed": "TRL, Axolotl, LLaMA-Factory"} | _called(TRL, "fsdp") | _called("TRL, Axolotl", "fsdp_config"),
        ("config",),
        "config: zero2",
        "also zero3, fsdp2, or an accelerate configuration file",
    ),
    # adapters
    Concept({"lora_rank": FACTORY}, ("lora_r",)),
    Concept(
        {"peft_config": TRL, "use_peft": TRL, "adapter": AXOLOTL, "finetuning_type": FACTORY},
        ("lora_r",),
        note="with it adapters are trained, without it all weights",
    ),
    Concept({"lora_target": FACTORY}, ("lora_target_modules",)),
    Concept({"lora_dropout_p": COMMON}, ("lora_dropout",)),
    Concept({"lora_modules_to_save": AXOLOTL, "additional_target": FACTORY}, ("modules_to_save",)),
    Concept(
        {"load_in_4bit": "TRL, Axolotl", "bnb_4bit_quant_type": "transformers", "use_bnb_nested_quant": TRL}
        | {"quantization_bit": FACTORY, "quantization_config": "transformers"},
        ("quantization",),
        "quantization: nf4",
        "with lora_r",
    ),
    Concept(
        {"load_in_8bit": "TRL, Axolotl"}, ("quantization",), "quantization: nf4", "4 bits, with lora_r; there are no 8"
    ),
    # losses
    Concept({"pref_beta": FACTORY, "rl_beta": AXOLOTL, "kl_loss_coef": VERL}, ("beta",)),
    Concept({"pref_loss": FACTORY, "rl": AXOLOTL}, ("loss_type",)),
    Concept(
        {"train_on_inputs": AXOLOTL, "train_on_prompt": FACTORY},
        ("completion_only_loss",),
        note="true there is false here",
    ),
    Concept({"reward_funcs": TRL}, ("rewards",)),
    Concept({"max_new_tokens": "transformers", "response_length": "TRL's PPO"}, ("max_completion_length",)),
    Concept({"n": VERL, "num_return_sequences": "transformers"}, ("num_generations",)),
    Concept({"max_num_gen_batches": VERL}, ("dynamic_sampling_rounds",)),
    Concept({"adv_estimator": VERL}, ("advantage_estimator",)),
    Concept({"clip_ratio_low": VERL}, ("epsilon",)),
    Concept({"clip_ratio_high": VERL}, ("epsilon_high",)),
    Concept({"entropy_coeff": VERL}, ("entropy_coef",)),
    Concept({"kl_loss_type": VERL}, ("kl_estimator",)),
    Concept(
        _called(TRL, "vllm_importance_sampling_correction"), ("importance_sampling_mode",), note="null is no correction"
    ),
    Concept(_called(TRL, "vllm_importance_sampling_mode"), ("importance_sampling_mode",)),
    Concept(
        {"vllm_importance_sampling_clip_max": TRL, "vllm_importance_sampling_cap": "TRL before 2.0"},
        ("importance_sampling_clip_max",),
    ),
    Concept(_called(TRL, "vllm_importance_sampling_clip_min"), ("importance_sampling_clip_min",)),
    # vLLM
    Concept(_called(TRL, "use_vllm"), ("rollouts",), "rollouts: {engine: vllm}"),
    Concept(
        _called(TRL, "vllm_mode"),
        ("rollouts",),
        "rollouts: {engine: vllm}",
        "colocate is vllm, server is vllm_server",
    ),
    Concept(
        _called(TRL, "vllm_server_base_url", "vllm_server_host", "vllm_server_port"),
        ("urls",),
        'urls: ["http://HOST:PORT"]',
        "with engine: vllm_server",
    ),
    Concept(_called(TRL, "vllm_gpu_memory_utilization"), ("gpu_memory_utilization",)),
    Concept(_called(TRL, "vllm_tensor_parallel_size"), ("tensor_parallel_size",)),
    Concept(_called(TRL, "vllm_enable_sleep_mode"), ("enable_sleep_mode",)),
    Concept(_called(TRL, "vllm_server_timeout"), ("start_timeout_seconds",)),
    # models and data
    Concept({"base_model": AXOLOTL, "model_name_or_path": "TRL, LLaMA-Factory"}, ("model",)),
    Concept({"dataset_name": TRL, "datasets": AXOLOTL}, ("dataset", "source"), note="rows come from a `normalize`"),
    Concept({"train_dataset": TRL, "train_data": COMMON}, ("dataset",)),
    Concept({"ref_model": TRL}, ("reference",)),
    Concept(
        _called(TRL, "precompute_ref_log_probs", "precompute_ref_batch_size"),
        ("reference_logprobs",),
        note="the input, from a stage of that name; without it they are computed at the start",
    ),
    Concept(_called(TRL, "remove_unused_columns"), note="columns that a stage does not know are left alone"),
    Concept(_called(TRL, "disable_dropout"), note="dropout is what the input model's configuration says"),
    Concept({"teacher_model_name_or_path": TRL}, ("teacher",)),
    Concept(
        {"seq_kd": "TRL's GKD"},
        note="a stage `sample` of the teacher makes completions (output `completions`), which `sft` or `distill` "
        "trains on",
    ),
    Concept(
        _called(AXOLOTL, "kd_trainer", "kd_ratio", "kd_ce_alpha", "kd_alpha", "kd_temperature"),
        note="a stage `distill` learns a teacher's distributions (`beta`, `temperature`)",
    ),
    Concept({"reward_model_path": TRL}, ("reward_model",)),
    Concept(
        {"template": FACTORY} | _called("TRL, Axolotl", "chat_template") | {"chat_template_path": TRL},
        note="the chat template is the one of the input model's tokenizer, and another goes into that model's folder; "
        "`templates` of `normalize` make text of columns",
    ),
    Concept(
        {"val_set_size": AXOLOTL, "val_size": FACTORY},
        ("test_size",),
        note="a stage `normalize` splits, and a stage `evaluate` measures on its output `test`",
    ),
    # during a run
    Concept(
        _called(TRL, "eval_steps", "eval_strategy", "evaluation_strategy", "do_eval", "eval_on_start", "eval_dataset")
        | _called(TRL, "per_device_eval_batch_size")
        | _called(AXOLOTL, "evals_per_epoch", "eval_batch_size"),
        note="`sft`, `distill`, both preference stages and both of reward models measure their input `eval_dataset` "
        "every `eval_steps` steps; a stage `evaluate` measures the model that comes out",
    ),
    Concept(
        _called(TRL, "logging_steps", "logging_strategy", "logging_first_step"),
        note="every step is logged, in metrics.jsonl of the output and to `report_to`",
    ),
    Concept({"save_steps": TRL}, ("checkpoint_steps",)),
    Concept(
        {"save_strategy": TRL, "saves_per_epoch": AXOLOTL, "save_total_limit": TRL},
        ("checkpoint_steps",),
        note="checkpoints are for resuming; the output is the model of the last step, or with `keep` the best",
    ),
    Concept(
        _called("TRL, Axolotl", "resume_from_checkpoint") | {"auto_resume_from_checkpoints": AXOLOTL},
        note="a run takes up the last checkpoint by itself; `--force STAGE` begins anew",
    ),
    Concept(
        _called(TRL, "load_best_model_at_end", "metric_for_best_model"),
        ("keep",),
        "keep: best",
        "the weights with the lowest loss of input `eval_dataset`",
    ),
    Concept({"early_stopping_patience": AXOLOTL}, ("stop_on",), note="monitors that end the run"),
    Concept(
        _called(TRL, "early_stopping_threshold"),
        note="with `early_stopping_patience`, any lower loss of input `eval_dataset` counts",
    ),
    Concept(
        {"wandb_project": AXOLOTL, "use_wandb": COMMON, "use_tensorboard": AXOLOTL},
        ("report_to",),
        "report_to: [wandb]",
        "or tensorboard, trackio, mlflow; the project is posttrain- and the recipe's name",
    ),
    Concept(
        {"wandb_entity": AXOLOTL, "wandb_run_id": AXOLOTL, "wandb_name": AXOLOTL, "run_name": TRL},
        ("report_to",),
        "report_to: [wandb]",
        "Weights & Biases reads the rest from its environment variables",
    ),
    Concept(
        {"push_to_hub": TRL, "hub_model_id": "TRL, Axolotl", "hub_strategy": "TRL, Axolotl"}
        | _called(TRL, "hub_private_repo", "hub_revision", "hub_token"),
        note="a stage of its own uploads what another one made: `uses: push_to_hub`, `with: {repo: owner/name}`, "
        "with the token of HF_TOKEN",
    ),
    Concept({"output_dir": TRL}, note="outputs are artifacts of the store, and `--store` says where that is"),
    Concept({"type": "other pipelines"}, note="what a stage does, `uses` says, beside `with`"),
)

FOREIGN = {name: concept for concept in CONCEPTS for name in concept.called}
"""Name elsewhere -> what it is."""


VALUES = {
    "dpo": "sigmoid",
    "cosine_with_min_lr": "cosine, with min_lr_ratio",
    "constant_with_warmup": "constant, with warmup_steps",
    "wsd": "warmup_stable_decay",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit, which stays on the GPU",
    "paged_adamw_32bit": "adamw, which stays on the GPU",
}
"""Value elsewhere -> what it is here."""


def foreign_value(value: str, choices: Sequence[str]) -> str:
    """`; here it is sigmoid` where the value is another tool's; else nothing."""
    meant = VALUES.get(value.lower(), "")
    return f"; here it is {meant}" if meant.partition(",")[0] in choices else ""


def foreign(name: str, valid: Sequence[str], elsewhere: Mapping[str, Sequence[str]] | None = None) -> str:
    """`; here it is 'x' (TRL)` where the key is another tool's name, or what is done in its place; else nothing.

    `elsewhere`: section -> names that belong there.
    """
    concept = FOREIGN.get(name)
    if concept is None:
        return ""
    whose = concept.called[name]
    if not concept.fields:
        return f"; {concept.note} ({whose})"
    note = f": {concept.note}" if concept.note else ""
    field, place = next(_places(concept, valid, elsewhere or {}), (concept.fields[0], ", which is not taken here"))
    return f"; here it is `{concept.written or field}`{place} ({whose}{note})"


def _places(
    concept: Concept, valid: Sequence[str], elsewhere: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str]]:
    """Fields that there are, each with where it stands."""
    yield from ((field, "") for field in concept.fields if field in valid)
    for section, names in elsewhere.items():
        yield from ((field, f" under `{section}:`") for field in concept.fields if field in names)
