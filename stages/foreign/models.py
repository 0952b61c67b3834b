"""The model that is trained, where it comes from, and what its loader may be told."""

from __future__ import annotations

from stages.foreign.concept import AXOLOTL, FACTORY, TRL, Concept, called

CONCEPTS = (
    Concept({"merge_method": "mergekit"}, ("method",), stage="average"),
    Concept({"base_model": AXOLOTL, "model_name_or_path": "TRL, LLaMA-Factory"}, ("model",)),
    Concept(
        {"model_revision": "TRL, LLaMA-Factory", "revision_of_model": AXOLOTL},
        ("model",),
        "model: owner/name@COMMIT",
        "the full commit, 40 hexadecimal digits",
    ),
    Concept(
        called(TRL, "model_init_kwargs", "teacher_model_init_kwargs"),
        note="models are loaded in one way, with `bf16` and `quantization` to choose; their folder's config.json says "
        "the rest",
    ),
    Concept(
        called("TRL, Axolotl, LLaMA-Factory", "trust_remote_code"),
        note="code that a model or a dataset brings is never run: models are of kinds that transformers has, and "
        "`source.function` of a `normalize` reads rows of any form",
    ),
    Concept(
        {"rope_scaling": FACTORY, "overrides_of_model_config": AXOLOTL},
        note="the config.json of the input model's folder says it; give a folder with another one",
    ),
    Concept(
        called(AXOLOTL, "tokenizer_type", "tokenizer_config", "tokenizer_use_fast", "base_model_config")
        | {"tokenizer_name_or_path": TRL},
        note="the tokenizer and the configuration are those of the input model's folder",
    ),
    Concept(
        called(AXOLOTL, "plugins"),
        note="there are no plugins; rewards, tools, environments and what reads a source are functions of your own, "
        "`file.py:name`",
    ),
    Concept({"stage": FACTORY, "type": "other pipelines"}, note="what a stage does, `uses` says, beside `with`"),
    Concept(called("transformers", "do_train"), note="what is done, `uses` of every stage says"),
)
