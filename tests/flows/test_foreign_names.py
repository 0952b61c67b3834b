"""Names of TRL, Axolotl and LLaMA-Factory in a recipe: what does the same here, or why nothing does."""

from __future__ import annotations

import pytest

from artifacts.errors import RequestError
from flows.launch_settings import Launch
from flows.recipe import Recipe
from stages.foreign import CONCEPTS, FOREIGN
from stages.rollouts.engine_settings import EngineConfig
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
    ("rl", "eval_steps", "a stage `evaluate` measures the model that comes out"),
    ("sft", "eval_strategy", "a stage `evaluate` measures the model that comes out"),
    ("sft", "logging_steps", "every step is logged"),
    ("sft", "gradient_clipping", "here it is `max_grad_norm` (DeepSpeed)"),
    ("sft", "torch_dtype", "here it is `bf16: true`"),
    ("sft", "fp16", "no float16"),
    ("sft", "template", "the one of the input model's tokenizer"),
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
    ("sft", "load_in_4bit", "here it is `quantization: nf4` (TRL, Axolotl: with lora_r)"),
    ("sft", "load_in_8bit", "there are no 8"),
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
    ("rl", "early_stopping_patience", "here it is `stop_on`"),
    ("sft", "load_best_model_at_end", "here it is `keep: best`"),
    ("preference", "precompute_ref_log_probs", "the input, from a stage of that name"),
    ("preference", "disable_dropout", "what the input model's configuration says"),
    ("sft", "lr_scheduler_kwargs", "here it is `min_lr_ratio`"),
    ("sft", "dataset_name", "here it is `dataset` under `inputs:`"),
    ("normalize", "dataset_name", "here it is `source`"),
]


@pytest.mark.parametrize(("uses", "name", "answer"), ANSWERS)
def test_the_answer(uses: str, name: str, answer: str) -> None:
    what = said(uses, **{name: 1})[name]
    assert what.startswith("unknown key; ")
    assert answer in what
    assert "did you mean" not in what


def test_every_answer_names_what_there_is() -> None:
    known = set(Launch.model_fields) | set(EngineConfig.model_fields)
    for stage in map(load_stage, STAGES):
        known |= {*stage.config.model_fields, *stage.inputs}
    assert {field for concept in CONCEPTS for field in concept.fields} <= known
    assert all(concept.fields or concept.note for concept in CONCEPTS)
    assert len(FOREIGN) == sum(len(concept.called) for concept in CONCEPTS), "a name stands in two concepts"


def test_no_answer_hides_a_field_of_the_stage() -> None:
    """A name elsewhere that is a field here is that field: chat_template of init_model."""
    with pytest.raises(RequestError) as error:
        Recipe.from_dict({"name": "mine", "stages": {"it": {"uses": "init_model", "with": {"chat_template": 1}}}})
    assert "chat_template: expected text or null, found 1" in str(error.value)


def test_what_a_stage_takes_is_listed_once() -> None:
    texts = said("normalize", source={"path": "hub:a/b", "zzz": 1, "qqq": 2}, www=1, vvv=2, eval_steps=3)
    known = "source, type, columns, templates, keep_columns, system, chat_template_kwargs, deduplicate, filters, on_bad_row, limit, "
    assert texts["www"] == f"unknown key; known are: {known}test_size, group_by, seed"
    assert texts["vvv"] == "unknown key; the known ones are listed above"
    assert texts["source.zzz"] == "unknown key; known are: path, function, arguments, format, subset, split"
    assert texts["source.qqq"] == "unknown key; the known ones are listed above"


@pytest.mark.parametrize(
    ("field", "value", "way"),
    [
        ("scale_rewards", False, "found the boolean false (write none)"),
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
        ("sft", "lr_scheduler_type", "cosine_with_min_lr", "; here it is cosine, with min_lr_ratio"),
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
