"""How completions are drawn, how many, and which of them are trained."""

from __future__ import annotations

from stages.foreign.concept import TRL, VERL, VLLM, Concept, called

CONCEPTS = (
    Concept(
        {"max_new_tokens": "transformers", "response_length": "TRL's PPO", "max_response_length": VERL},
        ("max_completion_length",),
    ),
    Concept({"n": VERL, "num_return_sequences": "transformers"}, ("num_generations",)),
    Concept(
        called(TRL, "num_generations_eval"),
        note="a stage `evaluate` has `num_generations` of its own",
    ),
    Concept(
        called(TRL, "num_value_samples"),
        note="input `samples` has them: `num_generations` of the stage `sample` that makes it",
    ),
    Concept(
        called(TRL, "top_p", "top_k", "min_p", "repetition_penalty"),
        note="`sample`, `evaluate`, `rl`, `online_dpo`, `nash_md`, `a2po` and `sdpo` have it; `ppo` and `distill` draw "
        "from all tokens",
    ),
    Concept(
        called(TRL, "generation_kwargs"),
        note="each has a field of its own: `temperature`, and where it may be chosen `top_p`, `top_k`, `min_p`, "
        "`repetition_penalty`, `stop_token_ids`, `stop_strings`",
    ),
    Concept(
        called(TRL, "vllm_structured_outputs_regex", "vllm_guided_decoding_regex", "guided_decoding_regex")
        | called(VLLM, "guided_regex"),
        ("structured",),
        "structured: {regex: ...}",
    ),
    Concept(called(VLLM, "guided_json"), ("structured",), "structured: {json_schema: ...}"),
    Concept(called(VLLM, "guided_choice"), ("structured",), "structured: {choices: [...]}"),
    Concept(called(VLLM, "guided_grammar"), ("structured",), "structured: {grammar: ...}"),
    Concept(
        called(VLLM, "structured_outputs", "guided_decoding", "response_format"),
        ("structured",),
        note="with one of regex, json_schema, choices and grammar",
    ),
    Concept(
        {"do_sample": "transformers"},
        ("temperature",),
        note="0 takes the likeliest token, in `sample` and `evaluate`",
    ),
    Concept(called("transformers", "num_beams"), note="completions are sampled; there is no beam search"),
    Concept(
        called(TRL, "log_completions", "num_completions_to_print", "log_unique_prompts", "wandb_log_unique_prompts"),
        ("log_completions_steps",),
        note="a table of the first four is shown every so many steps; output `rollouts` has all",
    ),
    Concept(
        called(TRL, "log_completions_hub_repo"),
        note="output `rollouts` has all completions; a stage `push_to_hub` uploads it",
    ),
    Concept(
        called(TRL, "cache_implementation", "use_transformers_paged", "use_transformers_continuous_batching")
        | called(TRL, "transformers_continuous_batching_config"),
        note="the embedded engine has a cache of its own and fills places as they get free; there is nothing to set",
    ),
    Concept(
        called(VERL, "max_num_gen_batches", "filter_groups"),
        ("dynamic_sampling_rounds",),
        note="how many times; 0 is off",
    ),
    Concept(
        called(VERL, "filter_overlong_prompts"),
        note="prompts longer than `max_length` are always left out, and counted in the ledger",
    ),
    Concept(
        called(TRL, "max_inflight_tasks", "queue_maxsize"),
        ("max_staleness",),
        note="it bounds what is sampled ahead",
    ),
    Concept(
        called(TRL, "weight_sync_steps", "vllm_sync_frequency"),
        ("max_staleness",),
        note="weights are sent before every generation; with this, completions may be of older ones",
    ),
)
