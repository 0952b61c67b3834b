"""Distillation: the teacher, and how its distributions are learnt."""

from __future__ import annotations

from stages.foreign.concept import AXOLOTL, TRL, Concept, called

CONCEPTS = (
    Concept({"teacher_model_name_or_path": TRL}, ("teacher",)),
    Concept(
        called(TRL, "teacher_model_revision"),
        ("teacher",),
        "teacher: owner/name@COMMIT",
        "the full commit, 40 hexadecimal digits",
    ),
    Concept(
        called(TRL, "teacher_model_kind"),
        ("teacher_update_rate",),
        note="without input `teacher` the model teaches itself, as it was or, with this, following what it learns",
    ),
    Concept(
        called(TRL, "teacher_model_server_url", "teacher_server_urls", "use_teacher_server"),
        ("teacher_engine",),
        'teacher_engine: {engine: vllm_server, urls: ["http://HOST:PORT"], weights_folder: /SHARED}',
        "with loss_top_k; without urls the stage starts the server; `teacher_engines` is a list, of several teachers",
    ),
    Concept(
        called(TRL, "teacher_id"),
        ("teacher_column",),
        "teacher_column: teacher_id",
        "and teacher_names, in the order of input teacher",
    ),
    Concept(called(TRL, "teacher_tokenizer_name_or_path"), ("teacher",), note="a model comes with its tokenizer"),
    Concept(called(TRL, "use_uld_loss"), ("cross_tokenizer",), "cross_tokenizer: {}"),
    Concept(called(TRL, "uld_use_hybrid_loss"), ("cross_tokenizer",), "cross_tokenizer: {loss_type: hybrid}"),
    Concept(
        called(TRL, "uld_token_merge_strategy"),
        ("cross_tokenizer",),
        "cross_tokenizer: {token_merge_strategy: observed}",
        "or bayesian",
    ),
    Concept(
        called(TRL, "uld_hybrid_matched_weight", "uld_hybrid_unmatched_weight"),
        ("cross_tokenizer",),
        "cross_tokenizer: {loss_type: hybrid, matched_weight: W, unmatched_weight: W}",
    ),
    Concept(
        called(TRL, "uld_student_temperature", "uld_teacher_temperature"),
        ("cross_tokenizer",),
        "cross_tokenizer: {student_temperature: T, teacher_temperature: T}",
    ),
    Concept(
        called(TRL, "uld_crossentropy_weight", "uld_distillation_weight"),
        ("cross_tokenizer",),
        "cross_tokenizer: {crossentropy_weight: W}",
        "beside the divergence, whose weight is 1",
    ),
    Concept(
        called(TRL, "uld_skip_student_eos", "uld_skip_teacher_eos"),
        ("cross_tokenizer",),
        "cross_tokenizer: {skip_eos: true}",
        "of both: an end has nothing to be compared with where the other is left out",
    ),
    Concept(
        called(TRL, "use_extended_uld"),
        note="`cross_tokenizer` always compares tokens that end at the same byte of the text",
    ),
    Concept(
        {"seq_kd": "TRL's GKD"},
        note="a stage `sample` of the teacher makes completions (output `completions`), which `sft` or `distill` "
        "trains on",
    ),
    Concept(called(TRL, "distillation_alpha"), ("beta",)),
    Concept(called(TRL, "distillation_topk", "teacher_top_k"), ("loss_top_k",)),
    Concept(
        called(TRL, "distillation_mode"),
        ("loss_top_k",),
        note="null is full_logits, a number topk_logits; for sampled_token give `loss_type: iw_opd, iw_opd_gamma: 0`",
    ),
    Concept(
        called(TRL, "loss_add_tail", "distillation_add_tail", "add_tail_bucket"),
        note="with `loss_top_k` all other tokens always count, by what they sum to",
    ),
    Concept(called(TRL, "distillation_objective"), ("loss_type",), "loss_type: iw_opd", "divergence is TRL's jsd"),
    Concept(
        called(TRL, "iw_opd_epsilon"),
        note="`loss_type: iw_opd` divides by no sum that is 0: where all advantages are, every weight is the first's",
    ),
    Concept(
        called(TRL, "rkl_advantage"),
        ("loss_type",),
        "loss_type: minillm",
        "which always has it; without it the exact divergence is left, which is `loss_type: divergence`",
    ),
    Concept(
        called(TRL, "reverse_kl_top_1_mode"),
        note="with `loss_top_k` the tokens are the teacher's likeliest; the sampled one is that of `loss_type: iw_opd`",
    ),
    Concept(
        called(TRL, "distillation_is_clip"),
        ("importance_sampling_mode",),
        "importance_sampling_mode: token_truncate, importance_sampling_clip_max: CLIP",
        "of a policy gradient (`loss_type`); a divergence is exact whoever wrote the tokens before",
    ),
    Concept(
        called(TRL, "include_environment_feedback"),
        ("feedback_column", "feedback_function"),
        "feedback_column: privileged_context",
        "or another column, or feedback_function: file.py:name",
        stage="sdpo",
    ),
    Concept(
        called(TRL, "diagnostics_warning_interval", "diagnostics_flat_tolerance"),
        ("stop_on",),
        note="monitors no_signal, constant_reward and nothing_taught speak once",
    ),
    Concept(called(TRL, "teacher_temperature"), ("temperature",), note="of both models"),
    Concept(
        called(TRL, "generate_from_teacher"),
        ("lmbda",),
        "lmbda: 0",
        "on the completions of a stage `sample` of the teacher",
    ),
    Concept(
        {"kd_temperature": "Axolotl, TRL"},
        ("temperature",),
        note="of both models, and of sampling",
        stage="distill",
    ),
    Concept(
        called(AXOLOTL, "kd_trainer", "kd_ratio", "kd_ce_alpha", "kd_alpha"),
        note="a stage `distill` learns a teacher's distributions (`beta`, `temperature`)",
    ),
)
