"""Names: the nearest valid one to a misspelt one, and what other tools call our fields."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_NAME = 200
"""Characters of a text that may be a misspelt name; comparing longer ones takes long."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest valid name, or an empty string."""
    if len(name) > LONGEST_NAME:
        return ""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


FOREIGN = {
    # other tool's name: (ours, whose name it is)
    "per_device_train_batch_size": ("train_batch_size", "TRL: items of one optimizer step over all processes"),
    "gradient_accumulation_steps": ("train_batch_size", "TRL: accumulation follows from micro_batch_tokens"),
    "micro_batch_size": ("micro_batch_tokens", "Axolotl"),
    "sequence_len": ("max_length", "Axolotl"),
    "cutoff_len": ("max_length", "LLaMA-Factory"),
    "max_seq_length": ("max_length", "TRL before 0.20, Unsloth"),
    "lr": ("learning_rate", "Axolotl"),
    "num_epochs": ("num_train_epochs", "Axolotl"),
    "epochs": ("num_train_epochs", "common usage"),
    "lr_scheduler": ("lr_scheduler_type", "Axolotl"),
    "warmup_steps": ("warmup_ratio", "TRL: a share of all steps"),
    "lora_rank": ("lora_r", "LLaMA-Factory"),
    "lora_target": ("lora_target_modules", "LLaMA-Factory"),
    "lora_dropout_p": ("lora_dropout", "common usage"),
    "save_steps": ("checkpoint_steps", "TRL"),
    "bf16_full_eval": ("bf16", "TRL"),
    "pref_beta": ("beta", "LLaMA-Factory"),
    "rl_beta": ("beta", "Axolotl"),
    "pref_loss": ("loss_type", "LLaMA-Factory"),
    "rl": ("loss_type", "Axolotl"),
    "reward_funcs": ("rewards", "TRL"),
    "max_new_tokens": ("max_completion_length", "transformers"),
    "response_length": ("max_completion_length", "TRL's PPO"),
    "total_episodes": ("max_steps", "TRL's PPO: completions; here optimizer steps"),
    "max_num_gen_batches": ("dynamic_sampling_rounds", "verl"),
    "n": ("num_generations", "verl"),
    "base_model": ("inputs: {model: ...}", "Axolotl"),
    "model_name_or_path": ("inputs: {model: ...}", "TRL, LLaMA-Factory"),
    "dataset_name": ("inputs: {dataset: ...}", "TRL"),
    "datasets": ("inputs: {dataset: ...}", "Axolotl"),
    "ref_model": ("inputs: {reference: ...}", "TRL"),
    "teacher_model_name_or_path": ("inputs: {teacher: ...}", "TRL"),
    "reward_model_path": ("inputs: {reward_model: ...}", "TRL"),
    "max_prompt_length": ("max_length", "TRL before 0.25"),
    "vllm_importance_sampling_correction": ("importance_sampling_mode", "TRL: null is no correction"),
    "vllm_importance_sampling_mode": ("importance_sampling_mode", "TRL"),
    "vllm_importance_sampling_clip_max": ("importance_sampling_clip_max", "TRL"),
    "vllm_importance_sampling_clip_min": ("importance_sampling_clip_min", "TRL"),
    "vllm_importance_sampling_cap": ("importance_sampling_clip_max", "TRL before 2.0"),
    "adv_estimator": ("advantage_estimator", "verl"),
    "clip_ratio_low": ("epsilon", "verl"),
    "clip_ratio_high": ("epsilon_high", "verl"),
    "entropy_coeff": ("entropy_coef", "verl"),
    "kl_loss_coef": ("beta", "verl"),
    "kl_loss_type": ("kl_estimator", "verl"),
    "adam_beta1": ("betas", "TRL"),
    "adam_beta2": ("betas", "TRL"),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", "TRL"),
    "output_dir": ("--store", "TRL: outputs are artifacts of the store"),
    "type": ("uses", "other pipelines"),
}
"""Field names of TRL, Axolotl and LLaMA-Factory that mean something we name differently."""


def foreign(name: str, valid: Iterable[str]) -> str:
    """`; TRL's name for it: ours is 'x'` where the key is another tool's and ours exists here."""
    entry = FOREIGN.get(name)
    if entry is None:
        return ""
    ours, whose = entry
    return f"; here it is `{ours}` ({whose})" if ours in set(valid) or " " in ours or ours.startswith("-") else ""


FOREIGN_STAGES = {
    # what people call it: how a stage of ours does it
    "dpo": "`uses: preference` with `loss_type: sigmoid`",
    "ipo": "`uses: preference` with `loss_type: ipo`",
    "cpo": "`uses: preference` with `loss_type: cpo`",
    "orpo": "`uses: preference` with `loss_type: orpo`",
    "simpo": "`uses: preference` with `loss_type: simpo`",
    "tpo": "`uses: preference` with `loss_type: tpo`",
    "kto": "`uses: unpaired_preference` with `loss_type: kto`",
    "bco": "`uses: unpaired_preference` with `loss_type: bco`",
    "grpo": "`uses: rl` with `loss_type: grpo`",
    "dapo": "`uses: rl` with `loss_type: dapo`",
    "gspo": "`uses: rl` with `loss_type: gspo`",
    **{name: f"`uses: rl` with `loss_type: {name}`" for name in ("bnpo", "dr_grpo", "luspo", "gspo_token", "cispo")},
    **{name: f"`uses: rl` with `loss_type: {name}`" for name in ("sapo", "vespo", "gmpo")},
    "rloo": "`uses: rl` with `advantage_estimator: rloo`",
    "reinforce": "`uses: rl` with `advantage_estimator: rloo`",
    "reinforce++": "`uses: rl` with `advantage_estimator: reinforce_plus_plus_baseline`",
    "reinforce_plus_plus": "`uses: rl` with `advantage_estimator: reinforce_plus_plus_baseline`",
    "xpo": "`uses: online_dpo` with `xpo_alpha`",
    "gkd": "`uses: distill`",
    "distillation": "`uses: distill`",
    "reward": "`uses: reward_model`",
    "rm": "`uses: reward_model`",
    "prm": "`uses: process_reward_model`",
    "pt": "`uses: sft`",
    "pretrain": "`uses: sft`",
    "finetune": "`uses: sft`",
    "eval": "`uses: evaluate`",
    "generate": "`uses: sample`",
    "merge": "`uses: merge_adapter`, or `uses: average` for several models",
    "dataset": "`uses: normalize`",
}
"""Names of algorithms and steps elsewhere that are settings or stages of another name here."""


def stage_hint(name: str, stages: Iterable[str]) -> str:
    """`; here it is ...` for what others call a stage (`grpo`, `PPOTrainer`), or the nearest of ours."""
    known = list(stages)
    plain = name.lower().removesuffix("trainer").rstrip("_-")
    same = f"`uses: {plain}`" if plain in known else None
    elsewhere = FOREIGN_STAGES.get(plain, same)
    return f"; here it is {elsewhere}" if elsewhere else nearest(name, known)
