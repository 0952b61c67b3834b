"""What completions are worth: rewards, advantages, values, the divergence from the reference, the policy's loss."""

from __future__ import annotations

from stages.foreign.concept import FACTORY, TRL, VERL, Concept, called

CONCEPTS = (
    Concept({"reward_funcs": TRL}, ("rewards",)),
    Concept(
        called(VERL, "custom_reward_function", "reward_manager"),
        ("rewards",),
        'rewards: ["file.py:name"]',
    ),
    Concept(
        called(TRL, "judge"),
        ("rewards",),
        "rewards: [{name: judge, parameters: {model: NAME}}]",
        "a number for each completion, in place of a choice between two",
    ),
    Concept(
        called(VERL, "overlong_buffer", "overlong_buffer_cfg"),
        ("rewards",),
        "rewards: [{name: soft_overlong, parameters: {max_completion_len: N, soft_punish_cache: N}}]",
        "beside the others",
    ),
    Concept({"reward_model_path": TRL, "reward_model_type": FACTORY}, ("reward_model",)),
    Concept(called(FACTORY, "ppo_whiten_rewards"), ("whiten_rewards",)),
    Concept(
        called(FACTORY, "ppo_score_norm"),
        ("whiten_rewards",),
        note="divides by the deviation of a generation's rewards, not by that of all so far",
    ),
    Concept(
        called(VERL, "norm_adv_by_std_in_grpo"),
        ("scale_rewards",),
        note="true is group, false none",
    ),
    Concept({"adv_estimator": VERL}, ("advantage_estimator",), note="gae is a stage `ppo`"),
    Concept(
        called(VERL, "critic"),
        ("value_model",),
        note="without it the values are a head's on the policy",
        stage="ppo",
    ),
    # the divergence from the reference
    Concept(called(VERL, "use_kl_loss"), ("kl_placement",), "kl_placement: loss", "the default; beta is its weight"),
    Concept(
        called(VERL, "use_kl_in_reward"),
        ("kl_placement", "kl_coef"),
        note="kl_placement: reward, with beta; of `ppo` kl_coef",
    ),
    Concept({"kl_loss_coef": VERL}, ("beta",)),
    Concept(
        called(VERL, "kl_loss_type", "kl_penalty"), ("kl_estimator",), note="kl is k1, mse is k2, low_var_kl is k3"
    ),
    Concept(called(FACTORY, "ppo_target"), ("kl_target",)),
    # the policy's loss
    Concept(called(VERL, "clip_ratio"), ("epsilon", "cliprange")),
    Concept({"clip_ratio_low": VERL}, ("epsilon",)),
    Concept({"clip_ratio_high": VERL}, ("epsilon_high",)),
    Concept(called(VERL, "clip_ratio_c"), ("delta",)),
    Concept(
        called(VERL, "loss_agg_mode"),
        ("loss_type",),
        note="token-mean is dapo, seq-mean-token-mean grpo, seq-mean-token-sum-norm dr_grpo",
    ),
    Concept({"entropy_coeff": VERL}, ("entropy_coef",)),
    Concept({"ppo_epochs": "verl, LLaMA-Factory"}, ("num_iterations", "num_ppo_epochs")),
    Concept(
        called(TRL, "vllm_importance_sampling_correction"), ("importance_sampling_mode",), note="null is no correction"
    ),
    Concept(called(TRL, "vllm_importance_sampling_mode"), ("importance_sampling_mode",)),
    Concept(
        {"vllm_importance_sampling_clip_max": TRL, "vllm_importance_sampling_cap": "TRL before 2.0"},
        ("importance_sampling_clip_max",),
    ),
    Concept(called(TRL, "vllm_importance_sampling_clip_min"), ("importance_sampling_clip_min",)),
)
