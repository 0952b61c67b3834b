"""Names of TRL, Axolotl, LLaMA-Factory, verl and peft in a recipe: what does the same here, or why nothing does."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from artifacts.errors import RequestError
from flows.fields import field_slots, is_model
from flows.launch_settings import Launch
from flows.recipe import Recipe
from stages.foreign import CONCEPTS, FOREIGN
from stages.stage import STAGES, load_stage


def said(uses: str, **values: object) -> dict[str, str]:
    """Field -> what is said of it in `with` of a stage."""
    with pytest.raises(RequestError) as error:
        Recipe.from_dict({"name": "mine", "stages": {"it": {"uses": uses, "with": values}}})
    before = "recipe: stages.it.with."
    found = [problem for problem in error.value.problems if problem.where.startswith(before)]
    return {problem.where.removeprefix(before): problem.what for problem in found}


# by hand, from the fields' own descriptions here and the other tools' documentation
ANSWERS = [
    ("rl", "eval_on_start", "every `eval_steps` steps"),
    ("evaluate", "eval_steps", "a stage `evaluate` measures the model that comes out"),
    ("sft", "eval_strategy", "a stage `evaluate` measures the model that comes out"),
    ("sft", "logging_steps", "every step is logged"),
    ("sft", "gradient_clipping", "here it is `max_grad_norm` (DeepSpeed)"),
    ("sft", "torch_dtype", "here it is `bf16: true`"),
    ("sft", "fp16", "no float16"),
    ("sft", "template", "a stage `set_chat_template` gives the model another"),
    ("sft", "chat_template", "the one of the input model's tokenizer"),
    ("rl", "generation_batch_size", "here it is `steps_per_generation` (TRL"),
    ("sft", "adapter", "here it is `lora_r` (Axolotl"),
    ("sft", "peft_config", "here it is `lora_r` (TRL"),
    ("sft", "finetuning_type", "here it is `lora_r` (LLaMA-Factory"),
    ("sft", "deepspeed", "here it is `config: zero2` under `launch:`"),
    ("rl", "use_vllm", "here it is `rollouts: {engine: vllm}` (TRL)"),
    ("rl", "vllm_mode", "server is vllm_server"),
    ("sft", "use_vllm", "here it is `rollouts: {engine: vllm}`, which is not taken here (TRL)"),
    ("rl", "vllm_gpu_memory_utilization", "here it is `gpu_memory_utilization` under `rollouts:` (TRL)"),
    ("sft", "dataset_num_proc", "no data workers"),
    ("sft", "optimizer", "here it is `optim`"),
    ("sft", "optim_args", "muon_momentum"),
    ("sft", "use_ema", "here it is `weight_averaging: {kind: ema, decay: 0.999}` (diffusers"),
    ("preference", "update_ref_model", "here it is `ref_model_follows: average` (TRL"),
    ("average", "merge_method", "here it is `method` (mergekit)"),
    ("sft", "load_in_4bit", "here it is `quantization: nf4` (TRL, Axolotl: or fp4, or int8; with lora_r)"),
    ("sft", "load_in_8bit", "here it is `quantization: int8` (TRL, Axolotl: with lora_r)"),
    ("sft", "use_bnb_nested_quant", "always have their scales in 8 bits"),
    ("sft", "bnb_4bit_quant_storage", "another type is for slicing them"),
    ("sft", "llm_int8_threshold", "no state is rounded, so none is an outlier"),
    ("normalize", "val_set_size", "here it is `test_size` (Axolotl"),
    ("sft", "val_set_size", "here it is `test_size`, which is not taken here"),
    ("sft", "sample_packing", "always packed"),
    ("sft", "train_on_inputs", "here it is `completion_only_loss` (Axolotl: true there is false here)"),
    ("sft", "wandb_project", "here it is `report_to: [wandb]`"),
    ("sft", "push_to_hub", "`uses: push_to_hub`"),
    ("sft", "resume_from_checkpoint", "takes up the last checkpoint by itself"),
    ("sft", "save_strategy", "here it is `checkpoint_steps`"),
    ("sft", "attn_implementation", "nothing to set"),
    ("sft", "use_liger_kernel", "built in"),
    ("sft", "early_stopping_steps", "here it is `early_stopping_patience`"),
    ("sft", "load_best_model_at_end", "here it is `keep: best`"),
    ("preference", "precompute_ref_log_probs", "the input, from a stage of that name"),
    ("preference", "disable_dropout", "always so, but for sft"),
    ("sft", "lr_scheduler_kwargs", "here it is `min_lr_ratio`"),
    ("sft", "num_cycles", "here it is `lr_num_cycles` (transformers"),
    ("sft", "dataset_name", "here it is `dataset` under `inputs:`"),
    ("normalize", "dataset_name", "here it is `source`"),
    # the name of a field elsewhere, or near to one
    ("rl", "dtype", "here it is `bf16: true` (transformers: training keeps float32 master weights"),
    ("rl", "dtype", "; one of that name is under `rollouts:`"),
    ("distill", "dtype", "not the same as weights in bfloat16 alone"),
    ("rl", "sync_ref_model", "is of `preference` and `online_dpo`; elsewhere it stays"),
    ("distill", "top_p", "`ppo` and `distill` draw from all tokens"),
    ("ppo", "top_k", "`ppo` and `distill` draw from all tokens"),
    ("rl", "generation_kwargs", "each has a field of its own: `temperature`"),
    ("rl", "num_completions_to_print", "here it is `log_completions_steps` (TRL: a table of the first four"),
    ("sft", "shuffle_dataset", "an order that `seed` shuffles"),
    ("sft", "activation_offloading", "here it is `gradient_checkpointing` (TRL, Axolotl"),
    # batches and the optimizer
    ("rl", "token_budget", "here it is `micro_batch_tokens` (TRL"),
    ("rl", "total_training_steps", "here it is `max_steps` (verl)"),
    ("sft", "pad_to_multiple_of", "never padded"),
    ("sft", "dataloader_pin_memory", "no data workers"),
    ("sft", "sequence_parallel_degree", "never spread over GPUs"),
    ("rl", "grad_clip", "here it is `max_grad_norm` (verl)"),
    ("sft", "use_muon", "here it is `optim: muon` (LLaMA-Factory)"),
    ("sft", "use_galore", "this optimizer is not there"),
    # numbers, memory, processes
    ("sft", "tf32", "float32 is computed as float32"),
    ("sft", "torch_compile", "nothing is compiled"),
    ("sft", "full_determinism", "always on"),
    ("rl", "cast_lm_head_to_fp32", "in float32 from the logits on"),
    ("sft", "use_unsloth", "nothing to switch on (LLaMA-Factory)"),
    ("sft", "ddp_find_unused_parameters", "without torch's wrapper"),
    ("sft", "use_cpu", "here it is `config: cpu` under `launch:`"),
    # adapters
    ("sft", "r", "here it is `lora_r` (peft)"),
    ("sft", "bias", "beside adapters no bias is trained"),
    ("sft", "lora_task_type", "follows from the stage"),
    ("sft", "peft_init_lora_weights", "here it is `init_lora_weights` (Axolotl)"),
    ("sft", "pissa_init", "here it is `init_lora_weights: pissa` (LLaMA-Factory)"),
    ("sft", "pissa_convert", "always written for the weights as they came"),
    ("sft", "corda_config", "starts that take no pass over data"),
    ("sft", "layers_pattern", "such as layers.3.self_attn.q_proj"),
    ("sft", "num_virtual_tokens", "virtual tokens are no tokens of a row"),
    ("sft", "loraplus_lr_embedding", "an embedding's factors have learning_rate"),
    ("sft", "freeze_trainable_layers", "nothing else is frozen"),
    ("sft", "adapter_name_or_path", "here it is `model` under `inputs:` (LLaMA-Factory"),
    # losses of given rows
    ("sft", "roles_to_train", "here it is `assistant_only_loss: true` (Axolotl"),
    ("sft", "train_on_eos", "trained with its end token"),
    ("sft", "mask_history", "here it is `completion_only_loss: true` (LLaMA-Factory"),
    ("sft", "use_dft_loss", "here it is `loss_type: dft` (LLaMA-Factory"),
    ("sft", "label_smoothing_factor", "the cross-entropy has no smoothing"),
    ("sft", "moe_aux_loss_coef", "here it is `router_aux_loss_coef` (LLaMA-Factory"),
    ("preference", "pref_ftx", "here it is `loss_type: [sigmoid, sft], loss_weights: [1, WEIGHT]`"),
    ("preference", "dpo_norm_loss", "here it is `loss_type: sigmoid_norm` (Axolotl"),
    ("sft", "kto_desirable_weight", "here it is `desirable_weight`, of a stage `unpaired_preference` (Axolotl)"),
    ("unpaired_preference", "kto_chosen_weight", "here it is `desirable_weight` (LLaMA-Factory)"),
    ("ppo", "sft_model_path", "here it is `model` under `inputs:`"),
    # teachers
    ("distill", "use_uld_loss", "here it is `cross_tokenizer: {}` (TRL)"),
    ("distill", "uld_skip_teacher_eos", "here it is `cross_tokenizer: {skip_eos: true}` (TRL"),
    ("distill", "use_extended_uld", "tokens that end at the same byte"),
    ("distill", "teacher_top_k", "here it is `loss_top_k` (TRL)"),
    ("distill", "distillation_alpha", "here it is `beta` (TRL)"),
    ("distill", "distillation_objective", "here it is `loss_type: iw_opd` (TRL: divergence is TRL's jsd)"),
    ("distill", "iw_opd_epsilon", "divides by no sum that is 0"),
    ("distill", "rkl_advantage", "here it is `loss_type: minillm` (TRL"),
    ("distill", "kd_temperature", "here it is `temperature` (Axolotl, TRL"),
    ("sft", "kd_temperature", "here it is `temperature`, of a stage `distill`"),
    ("distill", "distillation_is_clip", "here it is `importance_sampling_mode: token_truncate, importance_sampling_cl"),
    ("rl", "single_step_decomposition", "it is a setting of distill"),
    (
        "sdpo",
        "include_environment_feedback",
        "here it is `feedback_column: privileged_context` (TRL: or another column",
    ),
    ("sdpo", "diagnostics_warning_interval", "monitors no_signal, constant_reward and nothing_taught speak once"),
    ("distill", "teacher_model_server_url", "here it is `teacher_engine: {engine: vllm_server, urls: ["),
    # rewards and rollouts
    ("rl", "clip_ratio", "here it is `epsilon` (verl)"),
    ("ppo", "clip_ratio", "here it is `cliprange` (verl)"),
    ("rl", "clip_ratio_c", "here it is `delta` (verl)"),
    ("rl", "loss_agg_mode", "token-mean is dapo"),
    ("rl", "norm_adv_by_std_in_grpo", "true is group, false none"),
    ("rl", "overlong_buffer", "name: soft_overlong"),
    ("rl", "filter_groups", "here it is `dynamic_sampling_rounds` (verl"),
    ("ppo", "critic", "here it is `value_model` under `inputs:` (verl"),
    ("rl", "critic", "here it is `value_model`, of a stage `ppo` (verl"),
    ("rl", "judge", "here it is `rewards: [{name: judge, parameters: {model: NAME}}]` (TRL"),
    ("a2po", "num_value_samples", "of the stage `sample` that makes it"),
    ("rl", "vllm_structured_outputs_regex", "here it is `structured: {regex: ...}` (TRL)"),
    ("ppo", "guided_json", "here it is `structured: {json_schema: ...}` (vLLM)"),
    ("sft", "guided_choice", "here it is `structured: {choices: [...]}`, which is not taken here (vLLM)"),
    ("rl", "vllm_group_port", "a port that is free"),
    # models and data
    ("sft", "trust_remote_code", "is never run"),
    ("sft", "model_revision", "here it is `model: owner/name@COMMIT` under `inputs:`"),
    ("normalize", "max_samples", "here it is `limit` (LLaMA-Factory)"),
    ("sft", "max_samples", "here it is `limit`, of a stage `normalize` (LLaMA-Factory)"),
    ("normalize", "dataset_text_field", "here it is `columns: {text: THEIRS}` (TRL)"),
    ("sft", "dataset_train_split", "split: NAME}`, of a stage `normalize` (TRL"),
    ("sft", "pretraining_dataset", "here it is `dataset` under `inputs:` (Axolotl: rows of type language_modeling"),
    ("mixture", "interleave_probs", "here it is `weights` (LLaMA-Factory)"),
    ("normalize", "default_system_message", "here it is `system: TEXT` (Axolotl"),
    ("sft", "enable_thinking", "`chat_template_kwargs: {enable_thinking: false}`, of a stage `normalize`"),
    ("rl", "chat_template_kwargs", "it is a setting of normalize"),
    ("sft", "special_tokens", "here it is `added_tokens`, of a stage `set_chat_template` (Axolotl"),
    ("sft", "eos_token", "it is a setting of set_chat_template"),
    ("distill", "num_generations", "it is a setting of sample, rl, "),
    ("preference", "max_completion_length", "more"),
    ("sft", "rope_scaling", "the config.json of the input model's folder"),
    ("sft", "stage", "`uses` says"),
    # during a run
    ("preference", "generate_during_eval", "a stage `evaluate`"),
    ("sft", "greater_is_better", "here it is `keep: best`"),
    ("sft", "project", "here it is `report_to: [wandb]` (transformers"),
    ("sft", "mlflow_tracking_uri", "here it is `report_to: [mlflow]` (Axolotl"),
    ("sft", "use_comet", "not this one"),
    ("rl", "save_freq", "here it is `checkpoint_steps` (verl)"),
]


@pytest.mark.parametrize(("uses", "name", "answer"), ANSWERS)
def test_the_answer(uses: str, name: str, answer: str) -> None:
    what = said(uses, **{name: 1})[name]
    assert what.startswith("unknown key; ")
    assert answer in what
    assert "did you mean" not in what


def fields(model: type[BaseModel]) -> set[str]:
    """Names of the fields, and of those of the models under them."""
    slots = [slot.annotation for info in model.model_fields.values() for slot in field_slots(info)]
    return {*model.model_fields, *(name for inner in slots if is_model(inner) for name in fields(inner))}


def taken() -> dict[str, set[str]]:
    """Stage -> what may be written in its `with`, `inputs` and `launch`."""
    stages = {name: load_stage(name) for name in STAGES}
    return {name: {*fields(one.config), *one.inputs, *Launch.model_fields} for name, one in stages.items()}


def test_every_answer_names_what_there_is() -> None:
    of_stages = taken()
    known = set().union(*of_stages.values())
    assert {field for concept in CONCEPTS for field in concept.fields} <= known
    assert all(concept.fields or concept.note for concept in CONCEPTS)
    assert len(FOREIGN) == sum(len(concept.called) for concept in CONCEPTS), "a name stands in two concepts"
    assert all(of_stages[concept.stage] & set(concept.fields) for concept in CONCEPTS if concept.stage)


def test_every_answer_is_asked_for() -> None:
    """A name elsewhere that every stage has for a field would never be looked up."""
    of_stages = taken()
    for name, concept in FOREIGN.items():
        lacking = [stage for stage, known in of_stages.items() if name not in known]
        assert lacking, name
        assert name not in concept.fields, f"{name} is said to be {name}"


def test_no_field_is_said_to_be_elsewhere() -> None:
    """A field of a stage that a concept says no stage has, or that only others have."""
    for name, stage in ((name, stage) for name, concept in FOREIGN.items() if (stage := concept.stage)):
        assert name not in load_stage(stage).config.model_fields, f"{name} is a field of {stage}"


def test_no_answer_hides_a_field_of_the_stage() -> None:
    """A name elsewhere that is a field here is that field: chat_template of init_model."""
    with pytest.raises(RequestError) as error:
        Recipe.from_dict({"name": "mine", "stages": {"it": {"uses": "init_model", "with": {"chat_template": 1}}}})
    assert "chat_template: expected text or null, found 1" in str(error.value)


def test_what_a_stage_takes_is_listed_once() -> None:
    texts = said("normalize", source={"path": "hub:a/b", "zzz": 1, "qqq": 2}, www=1, vvv=2, eval_steps=3)
    known = (
        "source, type, columns, templates, keep_columns, system, chat_template_kwargs, deduplicate, filters, "
        "on_bad_row, limit, test_size, group_by, seed"
    )
    assert texts["www"] == f"unknown key; known are: {known}"
    assert texts["vvv"] == "unknown key; the known ones are listed above"
    assert texts["source.zzz"] == "unknown key; known are: path, function, arguments, format, subset, split"
    assert texts["source.qqq"] == "unknown key; the known ones are listed above"


@pytest.mark.parametrize(
    ("field", "value", "way"),
    [
        ("scale_rewards", False, "found the boolean false (write none)"),
        ("scale_rewards", True, "found the boolean true (write group)"),
        ("top_k", -1, "found -1 (write 0)"),
        ("top_k", None, "found null (write 0)"),
        ("min_p", None, "found null (write 0)"),
        ("max_steps", -1, "found -1 (write null, or leave it out)"),
        ("warmup_steps", 0.1, "found 0.1 (write warmup_ratio: 0.1)"),
        ("warmup_steps", 1.5, "found 1.5"),
        ("bf16", "auto", "found text 'auto' (write true)"),
        ("lora_target_modules", "all", "found text 'all'; here it is all-linear"),
        ("report_to", "all", "(name those that you use; metrics.jsonl has every step in any case)"),
        (
            "report_to",
            "comet_ml",
            "(there is no Comet; name those that you use; metrics.jsonl has every step in any case)",
        ),
        ("scale_rewards", "goup", "found text 'goup'; did you mean 'group'?"),
        ("report_to", "wandb", "found text 'wandb' (write [wandb])"),
        ("report_to", "none", "found text 'none' (write [])"),
        ("report_to", "wandbb", "found text 'wandbb'; did you mean 'wandb'?"),
    ],
)
def test_a_value_as_others_write_it(field: str, value: object, way: str) -> None:
    assert said("rl", **{field: value})[field].endswith(way)


@pytest.mark.parametrize(
    ("uses", "field", "value", "text"),
    [
        ("preference", "loss_type", "dpo", "found text 'dpo'; here it is sigmoid"),
        ("preference", "loss_type", "cdpo", "; here it is sigmoid, with label_smoothing"),
        ("preference", "loss_type", "rso", "; here it is hinge"),
        ("preference", "loss_type", "sppo", "; here it is sppo_hard"),
        ("preference", "loss_type", "kto_pair", "(`uses: unpaired_preference` has it, which also takes pairs)"),
        ("sft", "loss_type", "chunked_nll", "; here it is nll"),
        ("distill", "loss_type", "jsd", "; here it is divergence, with a beta between 0 and 1"),
        (
            "rl",
            "loss_type",
            "rloo",
            "; here it is grpo, with advantage_estimator: rloo, importance_sampling_level: "
            "sequence_sum and kl_placement: reward",
        ),
        ("sft", "lr_scheduler_type", "cosine_with_min_lr", "; here it is cosine, with min_lr_ratio"),
        ("rl", "lr_scheduler_type", "reduce_lr_on_plateau", "go by the loss of held-out rows)"),
        ("unpaired_preference", "loss_type", "dpo", "found text 'dpo'"),
        ("sft", "optim", "adamw_torch_fused", "found text 'adamw_torch_fused'; here it is adamw"),
    ],
)
def test_values_of_others(uses: str, field: str, value: str, text: str) -> None:
    assert said(uses, **{field: value})[field].endswith(text)


def test_inputs_of_others() -> None:
    with pytest.raises(RequestError) as error:
        Recipe.from_dict({"name": "mine", "stages": {"it": {"uses": "sft", "inputs": {"train_dataset": "rows"}}}})
    (problem,) = [one for one in error.value.problems if one.where.endswith("inputs.train_dataset")]
    assert problem.what.startswith("unknown input; here it is `dataset` (TRL); sft takes: ")
