"""Mistakes of different kinds in one stage are named together, and no mistake makes up another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import RequestError
from flows.known_part import as_far_as_known, known_part, wrong_together
from flows.recipe import Recipe
from stages.stage import STAGES, load_stage

INPUTS = {"model": "owner/name", "dataset": "@rows"}


def mistakes(base: Path, uses: str, **values: Any) -> list[str]:
    """What is said of one stage, from its name on."""
    recipe = {"name": "mine", "stages": {"it": {"uses": uses, "inputs": INPUTS, "with": values}}}
    with pytest.raises(RequestError) as error:
        Recipe.from_dict(recipe, base=base)
    return [str(problem).removeprefix("recipe: stages.") for problem in error.value.problems]


def test_fields_files_lengths_and_adapters_in_one_go(tmp_path: Path) -> None:
    settings = {
        "learning_rate": "fast",
        "sede": 3,
        "lora_alpha": 16,
        "rewards": ["absent.py:score", "numeric_mach"],
        "reward_weights": [1.0],
    }
    said = mistakes(tmp_path, "rl", **settings)
    assert [text.partition(": ")[::2] for text in said] == [
        (
            "it",
            "no built-in reward 'numeric_mach'; did you mean 'numeric_match'?; there are exact_match, numeric_match, "
            "math, multiple_choice, think_format, regular_expression, json_schema, cosine_length, soft_overlong, "
            "repetition_penalty, code, judge, environment, or give file.py:name",
        ),
        ("it", "reward_weights has 1 numbers for 2 rewards"),
        ("it.with", "lora_alpha is of LoRA adapters; give lora_r too"),
        ("it.with.learning_rate", "expected a number above 0, found text 'fast'"),
        ("it.with.sede", "unknown key; did you mean 'seed'?"),
        ("it.with.rewards[0]", f"no such Python file: 'absent.py' (looked for {tmp_path}/absent.py)"),
    ]


@pytest.mark.parametrize(
    ("uses", "values", "place"),
    [
        ("sft", {"lora_alpha": 16, "lora_r": "8"}, "it.with.lora_r"),
        ("sft", {"lora_alpha": 16, "lora_rank": 8}, "it.with.lora_rank"),
        ("sft", {"lora_alpha": 16, "lora_rr": 8}, "it.with.lora_rr"),
        ("sft", {"lora_alpha": 16, "lora_r": float("inf")}, "it.with.lora_r"),
        ("sft", {"lora_alpha": 16, "adapter": "lora"}, "it.with.adapter"),
        ("rl", {"rewards": 3, "reward_weights": [1.0, 2.0]}, "it.with.rewards"),
        ("rl", {"reward_funcs": ["math"]}, "it.with.reward_funcs"),
        ("rl", {"rewards": ["exact_match"], "train_batch_size": 6, "num_generation": 3}, "it.with.num_generation"),
    ],
)
def test_nothing_is_said_that_a_wrong_field_may_change(
    tmp_path: Path, uses: str, values: dict[str, Any], place: str
) -> None:
    (said,) = mistakes(tmp_path, uses, **values)
    assert said.startswith(f"{place}: ")


@pytest.mark.parametrize("uses", ["prefrence", "dpo", "DPOTrainer"])
def test_a_name_of_no_stage_hides_nothing_below_it(tmp_path: Path, uses: str) -> None:
    unknown, *others = mistakes(tmp_path, uses, beta=0, learning_rat=1e-5)
    assert unknown.startswith(f"it.uses: unknown stage '{uses}'")
    assert others == [
        "it.with.beta: expected a number above 0, found 0",
        "it.with.learning_rat: unknown key; did you mean 'learning_rate'?",
    ]
    assert len(mistakes(tmp_path, "bogus", beta=0, learning_rat=1e-5)) == 1


REQUIRED = {"normalize": {"source": {"path": "hub:owner/name"}}, "mixture": {"weights": [1.0, 2.0], "names": ["a"]}}
SETTINGS = {"lora_alpha": 8.0, "rewards": ["math", "nothing"], "reward_weights": [1.0], "loss_weights": [1.0, 2.0]}


@pytest.mark.parametrize("name", STAGES)
def test_whichever_field_is_wrong_what_is_said_is_true_of_the_others(name: str) -> None:
    """What checks say beside one wrong field, they say of the same settings with that field right, too."""
    stage = load_stage(name)
    fields = stage.config.model_fields
    values = REQUIRED.get(name, {}) | {key: value for key, value in SETTINGS.items() if key in fields}
    if name == "rescore":
        values.pop("reward_weights")  # a mapping there
    wired = frozenset(input for input, declared in stage.inputs.items() if declared.required)

    def said(changed: dict[str, Any]) -> set[str]:
        known = known_part(stage.config, changed)
        return {*wrong_together(known), *(as_far_as_known(stage.check, known, wired) if stage.check else ())}

    right = said(values)
    for field in fields:
        assert said(values | {field: [[["no"]]]}) <= right, field
    assert said(values | {"no_such_key_at_all_1": 1}) == right
