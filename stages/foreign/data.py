"""Datasets: where rows come from, what their columns are, and how a chat becomes text."""

from __future__ import annotations

from stages.foreign.concept import AXOLOTL, COMMON, FACTORY, TRL, VERL, Concept, called

CONCEPTS = (
    Concept({"dataset_name": TRL, "datasets": AXOLOTL}, ("dataset", "source"), note="rows come from a `normalize`"),
    Concept({"train_dataset": TRL, "train_data": COMMON, "train_files": VERL}, ("dataset",)),
    Concept(called(VERL, "val_files"), ("eval_dataset",), note="or a stage `evaluate`"),
    Concept(
        called(AXOLOTL, "pretraining_dataset"),
        ("dataset",),
        note="rows of type language_modeling, from a `normalize`",
    ),
    Concept(
        {"dataset_config": TRL, "dataset_subset": COMMON},
        ("source",),
        "source: {path: hub:owner/name, subset: NAME}",
        stage="normalize",
    ),
    Concept(
        called(TRL, "dataset_train_split", "dataset_test_split"),
        ("source",),
        "source: {path: hub:owner/name, split: NAME}",
        "one for each split",
        stage="normalize",
    ),
    Concept(called(AXOLOTL, "ds_type"), ("format",), stage="normalize"),
    Concept(called(AXOLOTL, "data_files"), ("path",), note="a file, a folder or a glob", stage="normalize"),
    Concept(
        {"dataset_streaming": TRL, "streaming": "TRL, LLaMA-Factory", "buffer_size": FACTORY},
        note="a stage `normalize` reads the rows once and keeps them in the store; nothing is streamed",
    ),
    Concept(
        {"dataset_text_field": TRL, "text_column": AXOLOTL},
        ("columns",),
        "columns: {text: THEIRS}",
        stage="normalize",
    ),
    Concept(called(AXOLOTL, "field_messages"), ("columns",), "columns: {messages: THEIRS}", stage="normalize"),
    Concept(called(VERL, "prompt_key"), ("columns",), "columns: {prompt: THEIRS}", stage="normalize"),
    Concept(
        called(TRL, "dataset_kwargs"),
        note="rows that bring their token ids are of type pretokenized in a stage `normalize`",
    ),
    Concept(
        {"dataset_prepared_path": AXOLOTL, "tokenized_path": FACTORY, "dataset_dir": FACTORY},
        note="rows are kept in the store, by their content; there is no folder to name",
    ),
    Concept(
        called(FACTORY, "overwrite_cache", "overwrite_output_dir"),
        note="what is made already is not made again, unless it is asked for: `--force STAGE`",
    ),
    Concept({"max_samples": FACTORY}, ("limit",), stage="normalize"),
    Concept(called(FACTORY, "interleave_probs"), ("weights",), stage="mixture"),
    Concept(
        called(FACTORY, "mix_strategy"),
        ("rows",),
        stage="mixture",
        note="interleave_under is first_exhausted, interleave_over all_exhausted",
    ),
    Concept(
        {"val_set_size": AXOLOTL, "val_size": FACTORY},
        ("test_size",),
        note="a stage `normalize` splits, and a stage `evaluate` measures on its output `test`",
    ),
    Concept(called(TRL, "remove_unused_columns"), note="columns that a stage does not know are left alone"),
    Concept(called("transformers", "label_names"), note="what is learnt follows from the type of the rows"),
    # chats
    Concept(
        {"default_system_message": AXOLOTL, "default_system": FACTORY},
        ("system",),
        "system: TEXT",
        "for conversations that have none",
        stage="normalize",
    ),
    Concept(
        {"template": FACTORY}
        | called("TRL, Axolotl", "chat_template")
        | {"chat_template_path": TRL, "chat_template_jinja": AXOLOTL},
        note="the chat template is the one of the input model's tokenizer; a stage `set_chat_template` gives the model "
        "another; `templates` of `normalize` make text of columns",
    ),
    Concept(
        {"enable_thinking": FACTORY},
        ("chat_template_kwargs",),
        "chat_template_kwargs: {enable_thinking: false}",
        stage="normalize",
    ),
    Concept(called(TRL, "pad_token"), note="nothing is padded"),
    Concept(
        called(AXOLOTL, "special_tokens", "tokens", "added_tokens_overrides", "resize_token_embeddings_to_32x")
        | called(FACTORY, "new_special_tokens", "add_tokens", "add_special_tokens", "resize_vocab"),
        ("added_tokens",),
        note="embedding and head grow with them",
        stage="set_chat_template",
    ),
)
