"""Names: the nearest valid one to a misspelt one, and what other tools call our stages (`foreign`: our fields)."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping

LONGEST_NAME = 200
"""Characters of a text that may be a misspelt name; comparing longer ones takes long."""


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that the name is most likely a slip of; None: it is like none of them."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6) if len(name) <= LONGEST_NAME else []
    return close[0] if close else None


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest valid name, or an empty string."""
    close = closest(name, valid)
    return "" if close is None else f"; did you mean {close!r}?"


def one_slip(typed: str, meant: str) -> bool:
    """Whether one letter was left out, put in, replaced or exchanged with its neighbour."""
    start = _common(typed, meant)
    typed, meant = typed[start:], meant[start:]
    end = _common(typed[::-1], meant[::-1])
    typed, meant = typed[: len(typed) - end], meant[: len(meant) - end]
    return max(len(typed), len(meant)) == 1 or (len(typed) == 2 and typed == meant[::-1])


def _common(one: str, other: str) -> int:
    """Letters that both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


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
    "rloo": "`uses: rl` with `advantage_estimator: rloo`, `loss_type: grpo`, "
    "`importance_sampling_level: sequence_sum`, `kl_placement: reward`, `beta: 0.05` and `num_generations: 2`",
    "reinforce": "`uses: rl` with `advantage_estimator: rloo`",
    "reinforce++": "`uses: rl` with `advantage_estimator: reinforce_plus_plus_baseline`",
    "reinforce_plus_plus": "`uses: rl` with `advantage_estimator: reinforce_plus_plus_baseline`",
    "async_grpo": "`uses: rl` with `rollouts: {engine: vllm_server, max_staleness: 4}`",
    "ppov2": "`uses: ppo`",
    "xpo": "`uses: online_dpo` with `xpo_alpha`",
    "gkd": "`uses: distill`",
    "distillation": "`uses: distill`",
    "gold": "`uses: distill` with `cross_tokenizer: {}`",
    "server_distillation": "`uses: distill` with `teacher_engine: {engine: vllm_server}` and `loss_top_k`",
    **{name: f"`uses: distill` with `loss_type: {name}`" for name in ("iw_opd", "minillm")},
    "async_distillation": "`uses: distill` with `rollouts: {engine: vllm_server, max_staleness: 4}`, `teacher_engine: "
    "{engine: vllm_server}` and `loss_top_k`",
    "mopd": "`uses: distill` with several models as `teacher` and `teacher_column`",
    "sdft": "`uses: distill` without a teacher, on rows of type `privileged_context`",
    "ssd": "`uses: sft` on the completions of a stage `sample` of the same model",
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
    "train": "`uses: sft` on demonstrations, `uses: preference` on pairs, `uses: rl` on prompts with rewards",
    "fit": "`uses: sft` on demonstrations, `uses: preference` on pairs, `uses: rl` on prompts with rewards",
    **dict.fromkeys(
        ("train_sft", "supervised", "supervised_finetuning", "instruction_tuning", "full_finetune", "cpt"),
        "`uses: sft`",
    ),
    **dict.fromkeys(("lora", "qlora", "peft"), "`uses: sft` with `lora_r`"),
    **dict.fromkeys(("train_rm", "reward_modeling", "train_reward_model"), "`uses: reward_model`"),
    **dict.fromkeys(("train_dpo", "rlhf", "alignment", "preference_tuning"), "`uses: preference`"),
    **dict.fromkeys(("train_ppo",), "`uses: ppo`"),
    **dict.fromkeys(("train_kto",), "`uses: unpaired_preference` with `loss_type: kto`"),
    **dict.fromkeys(("train_grpo", "policy_gradient", "rlvr", "reinforcement_learning"), "`uses: rl`"),
    **dict.fromkeys(("knowledge_distillation", "kd", "opd"), "`uses: distill`"),
    **dict.fromkeys(("benchmark", "eval_model", "lm_eval", "test", "score", "validate"), "`uses: evaluate`"),
    **dict.fromkeys(("inference", "infer", "predict", "rollout", "rollouts", "batch_inference"), "`uses: sample`"),
    **dict.fromkeys(
        ("data", "load_dataset", "prepare", "preprocess", "tokenize", "load", "prepare_data", "load_data"),
        "`uses: normalize`",
    ),
    **dict.fromkeys(
        ("model", "base", "base_model", "create_model", "init"),
        "`uses: init_model`, or a Hub name or a folder as the input `model` of the stage that trains",
    ),
    **dict.fromkeys(("export", "merge_lora", "lora_combiner", "merge_and_unload"), "`uses: merge_adapter`"),
    "model_soup": "`uses: average`",
    "mergekit": "`uses: average`, whose `method` is linear, slerp, task_arithmetic, ties, dare_linear or dare_ties",
    "dare": "`uses: average` with `method: dare_ties` or `dare_linear`",
    **{
        name: f"`uses: average` with `method: {name}`"
        for name in ("slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")
    },
    **{name: f"a stage that trains, with `weight_averaging: {{kind: {name}}}`" for name in ("ema", "bema")},
    **dict.fromkeys(("upload", "push", "publish", "hub"), "`uses: push_to_hub`"),
    **dict.fromkeys(("decontaminate", "decontamination"), "`uses: contamination`"),
    **dict.fromkeys(("interleave", "mix", "concatenate_datasets"), "`uses: mixture`"),
    **dict.fromkeys(
        ("reference", "logprobs", "ref_logprobs", "precompute_ref_log_probs"), "`uses: reference_logprobs`"
    ),
    **dict.fromkeys(("teacher_logits", "teacher_logprobs"), "`uses: teacher_states`"),
    **dict.fromkeys(("chat_template", "tokenizer"), "`uses: set_chat_template`"),
}
"""Names of algorithms and steps elsewhere that are settings or stages of another name here."""


NEAR_STAGES = {
    "quantize": "a stage that trains with `quantization` and `lora_r`; weights are stored as they are trained",
    "chat": "`uses: sample`, which completes the prompts of a dataset",
}
"""Names of algorithms elsewhere that no stage has: the nearest one, and in what it differs."""


_USES = re.compile(r"`uses: (\w+)`")


def stage_hint(name: str, stages: Iterable[str]) -> str:
    """`; here it is ...` for what others call a stage (`grpo`, `PPOTrainer`), or the nearest of ours."""
    known = list(stages)
    plain = _plain(name.lower().removesuffix("trainer"))
    same = {_plain(stage): f"`uses: {stage}`" for stage in known}
    if elsewhere := _find(plain, FOREIGN_STAGES) or same.get(plain):
        return f"; here it is {elsewhere}"
    near = _find(plain, NEAR_STAGES)
    return f"; it is not here, and the nearest is {near}" if near else nearest(name, known)


def _find(plain: str, table: Mapping[str, str]) -> str | None:
    return next((text for name, text in table.items() if _plain(name) == plain), None)


def _plain(name: str) -> str:
    """As names of classes have it: OnlineDPOTrainer is online_dpo."""
    return name.replace("_", "").replace("-", "")


def meant_stage(name: str, stages: Iterable[str]) -> str | None:
    """The one stage that `stage_hint` names; None: it names none, or several."""
    known = list(stages)
    named = _USES.findall(stage_hint(name, known))
    return (named[0] if len(named) == 1 else None) if named else closest(name, known)
