"""During a run: measuring, stopping, checkpoints, what is kept."""

from __future__ import annotations

from stages.foreign.concept import AXOLOTL, FACTORY, TRANSFORMERS, TRL, VERL, Concept, called

CONCEPTS = (
    Concept(
        called(TRL, "eval_steps", "eval_strategy", "evaluation_strategy", "do_eval", "eval_on_start", "eval_dataset")
        | called(TRL, "per_device_eval_batch_size")
        | called(TRANSFORMERS, "eval_delay", "eval_accumulation_steps", "prediction_loss_only")
        | called(AXOLOTL, "evals_per_epoch", "eval_batch_size")
        | called(VERL, "test_freq"),
        note="stages that train measure their input `eval_dataset` every `eval_steps` steps; a stage `evaluate` "
        "measures the model that comes out",
    ),
    Concept(
        {"generate_during_eval": TRL, "do_predict": TRANSFORMERS, "predict_with_generate": FACTORY}
        | {"eval_table_size": AXOLOTL, "do_bench_eval": AXOLOTL},
        note="a stage `evaluate` with `rewards` samples completions and keeps them with their scores",
    ),
    Concept(
        called(TRL, "logging_steps", "logging_strategy", "logging_first_step"),
        note="every step is logged, in metrics.jsonl of the output and to `report_to`",
    ),
    Concept(
        called(TRANSFORMERS, "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node")
        | called(TRANSFORMERS, "logging_nan_inf_filter"),
        note="there is no progress bar and no level of logging to set",
    ),
    Concept(
        {"plot_loss": FACTORY},
        note="`posttrain report RUN -o FILE.html` draws the curves",
    ),
    Concept(
        called(TRANSFORMERS, "include_num_input_tokens_seen", "skip_memory_metrics")
        | called(FACTORY, "include_effective_tokens_per_second", "include_tokens_per_second"),
        note="tokens, time and memory are always counted; `posttrain ledger` shows them",
    ),
    Concept({"save_steps": TRL, "save_freq": VERL}, ("checkpoint_steps",)),
    Concept(
        {"save_strategy": TRL, "saves_per_epoch": AXOLOTL, "save_total_limit": TRL},
        ("checkpoint_steps",),
        note="checkpoints are for resuming; the output is the model of the last step, or with `keep` the best",
    ),
    Concept(
        called(TRANSFORMERS, "save_only_model"),
        note="the output is the model alone; checkpoints, which are for resuming, stand apart from it",
    ),
    Concept(
        called("TRL, Axolotl", "resume_from_checkpoint")
        | {"auto_resume_from_checkpoints": AXOLOTL, "ignore_data_skip": TRANSFORMERS},
        note="a run takes up the last checkpoint by itself; `--force STAGE` begins anew",
    ),
    Concept(
        called(TRL, "load_best_model_at_end", "metric_for_best_model") | called(TRANSFORMERS, "greater_is_better"),
        ("keep",),
        "keep: best",
        "the weights with the lowest loss of input `eval_dataset`, on-line with the highest reward",
    ),
    Concept({"early_stopping_steps": FACTORY}, ("early_stopping_patience",)),
    Concept(
        called(TRL, "early_stopping_threshold"),
        note="with `early_stopping_patience`, any lower loss of input `eval_dataset` counts, on-line any higher reward",
    ),
    Concept(
        {"loss_watchdog_threshold": AXOLOTL, "loss_watchdog_patience": AXOLOTL},
        ("stop_on",),
        "stop_on: [loss_spike, not_finite]",
    ),
    Concept(
        called(TRL, "callbacks"),
        note="there are no callbacks; monitors watch every run, and `stop_on` names those that end it",
    ),
    Concept(
        {"output_dir": "TRL, Axolotl, LLaMA-Factory"},
        note="outputs are artifacts of the store, and `--store` says where that is",
    ),
)
