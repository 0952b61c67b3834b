"""Steps, batches, lengths, and what is put into one pass."""

from __future__ import annotations

from stages.foreign.concept import AXOLOTL, COMMON, FACTORY, TRANSFORMERS, TRL, VERL, Concept, called

CONCEPTS = (
    Concept(
        called(TRL, "per_device_train_batch_size"),
        ("train_batch_size",),
        note="items of one optimizer step over all processes",
    ),
    Concept(
        called(TRL, "gradient_accumulation_steps"),
        ("train_batch_size",),
        note="accumulation follows from micro_batch_tokens",
    ),
    Concept(
        called(TRL, "generation_batch_size"),
        ("steps_per_generation",),
        note="a generation is of train_batch_size x steps_per_generation completions",
    ),
    Concept(called(VERL, "ppo_mini_batch_size"), ("train_batch_size",), note="prompts there; here completions"),
    Concept({"micro_batch_size": AXOLOTL}, ("micro_batch_tokens",)),
    Concept(
        {"token_budget": TRL} | called(VERL, "ppo_max_token_len_per_gpu", "use_dynamic_bsz"),
        ("micro_batch_tokens",),
        note="passes are always cut by tokens",
    ),
    Concept(
        called(TRANSFORMERS, "auto_find_batch_size"),
        note="out of memory, a stage halves its micro-batches by itself; the batch, and so the result, stays",
    ),
    Concept({"num_epochs": AXOLOTL, "epochs": COMMON, "total_epochs": VERL}, ("num_train_epochs",)),
    Concept(called(VERL, "total_training_steps"), ("max_steps",)),
    Concept({"total_episodes": "TRL's PPO"}, ("max_steps",), note="completions; here optimizer steps"),
    Concept(
        {"sequence_len": AXOLOTL, "cutoff_len": FACTORY, "max_seq_length": "TRL before 0.20, Unsloth"}
        | {"max_prompt_length": "TRL before 0.25, verl"},
        ("max_length",),
    ),
    Concept(
        called(AXOLOTL, "sample_packing", "eval_sample_packing", "pad_to_sequence_len", "multipack_real_batches")
        | called(FACTORY, "neat_packing")
        | called(TRL, "padding_free", "pad_to_multiple_of", "padding_value", "eval_packing")
        | called(TRANSFORMERS, "group_by_length", "length_column_name")
        | called(VERL, "use_remove_padding"),
        note="passes are always packed and never padded, and no row sees another; `packing` of `sft` is about steps of "
        "equal size",
    ),
    Concept(
        called(TRL, "shuffle_dataset")
        | called(TRANSFORMERS, "train_sampling_strategy")
        | called(FACTORY, "disable_shuffling")
        | called(AXOLOTL, "shuffle_merged_datasets", "curriculum_sampling"),
        note="rows come in an order that `seed` shuffles, anew in every epoch; there is nothing to set",
    ),
    Concept(
        called(TRL, "dataset_num_proc")
        | called(TRANSFORMERS, "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers")
        | called(TRANSFORMERS, "dataloader_prefetch_factor", "dataloader_multiprocessing_context")
        | called(TRANSFORMERS, "dataloader_in_order")
        | {"dataset_processes": AXOLOTL, "preprocessing_num_workers": FACTORY, "preprocessing_batch_size": FACTORY},
        note="there are no data workers to set",
    ),
    Concept(
        called(TRANSFORMERS, "dataloader_drop_last"),
        note="no row is left out: a step goes on over the end of an epoch, and only the run's last one may be short",
    ),
    Concept(
        called(AXOLOTL, "context_parallel_size", "sequence_parallel_degree", "ring_attn_func", "expert_parallel_size")
        | {"ulysses_sequence_parallel_size": VERL, "sequence_parallel_size": COMMON},
        note="a row is never spread over GPUs, nor are experts; gradient_checkpointing makes room for long rows, and "
        "`launch: {config: fsdp2}` shards the weights",
    ),
)
