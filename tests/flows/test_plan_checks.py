"""What a plan refuses before anything runs: what only the stages together, or what they read, can show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from artifacts import open_store
from artifacts.errors import RequestError
from flows.cli import main
from flows.plan import plan
from flows.recipe import Recipe
from stages import stage as stage_module
from stages.stage import STAGES, load_stage
from tests.stages.small_models import save_dataset, save_model

PAIRS = [{"prompt": "ab", "chosen": "c", "rejected": "d"}]
ROWS = [{"prompt": "ab", "completion": "c"}]
HELD = {"structured": {"regex": "a"}}


def problems(folder: Path, stages: dict[str, Any], store: Path | None = None) -> dict[str, str]:
    """Place -> what is wrong there."""
    recipe = Recipe.from_dict({"name": "wrong", "stages": stages}, base=folder)
    try:
        plan(recipe, open_store(str(store or folder / "store")))
    except RequestError as error:
        return {problem.where.removeprefix("recipe: stages."): problem.what for problem in error.problems}
    return {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", seed=1)
    save_dataset(tmp_path / "pairs", "preference", PAIRS)
    save_dataset(tmp_path / "rows", "prompt_completion", ROWS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def normalize(kind: str) -> dict[str, Any]:
    return {"uses": "normalize", "with": {"source": {"path": "rows.jsonl"}, "type": kind}}


def test_types_that_the_recipe_shows(folder: Path) -> None:
    """Of a literal, through stages that pass rows on, of what is sampled, and of folders; all at once."""
    stages = {
        "rows": normalize("prompt_completion"),
        "more": normalize("prompt_completion"),
        "mixed": {
            "uses": "mixture",
            "inputs": {"datasets": ["rows", "more"]},
            "with": {"weights": [1, 1], "rows": 1, "names": ["a", "b"]},
        },
        "drawn": {"uses": "sample", "inputs": {"model": "./model", "dataset": "rows"}, "with": {"rewards": ["math"]}},
        "dpo": {"uses": "preference", "inputs": {"model": "./model", "dataset": "mixed"}},
        "right": {"uses": "preference", "inputs": {"model": "./model", "dataset": "drawn.pairs"}},
        "sft": {"uses": "sft", "inputs": {"model": "./model", "dataset": "rows", "eval_dataset": "drawn.pairs"}},
        "judge": {"uses": "reward_model", "inputs": {"model": "./model", "dataset": "./rows"}},
        "steps": {"uses": "process_reward_model", "inputs": {"model": "./model", "dataset": "./pairs"}},
    }
    pairs = "preference, triple_preference, pretokenized_preference"
    remedy = "normalize the source to one of these, or wire another dataset in"
    assert problems(folder, stages) == {
        "dpo.inputs.dataset": "mixed.dataset is a dataset of type prompt_completion; preference takes "
        f"{pairs}: {remedy}",
        "sft.inputs.eval_dataset": "drawn.pairs is a dataset of type preference; sft takes language_modeling, "
        f"prompt_completion, pretokenized: {remedy}",
        "judge.inputs.dataset": f"./rows is a dataset of type prompt_completion; reward_model takes {pairs}: {remedy}",
        "steps.inputs.dataset": "./pairs is a dataset of type preference; process_reward_model takes "
        f"stepwise_supervision: {remedy}",
    }


def test_a_type_that_nobody_knows_yet_is_no_mistake(folder: Path) -> None:
    stages = {
        "rows": normalize("auto"),
        "dpo": {"uses": "preference", "inputs": {"model": "./model", "dataset": "rows"}},
    }
    assert problems(folder, stages) == {}


def test_types_of_what_is_in_the_store(folder: Path) -> None:
    """By an alias, and of a stage that is cached, whose source does not say its type."""
    store = open_store(str(folder / "store"))
    made = store.put("dataset", folder / "rows", producer={"stage": "normalize"})
    store.set_alias("mine/rows", made)
    stages = {"dpo": {"uses": "preference", "inputs": {"model": "./model", "dataset": "@mine/rows"}}}
    assert problems(folder, stages)["dpo.inputs.dataset"].startswith(
        "@mine/rows is a dataset of type prompt_completion"
    )


@pytest.mark.parametrize("uses", STAGES)
def test_what_a_stage_says_of_its_datasets_is_about_what_it_has(uses: str) -> None:
    stage = load_stage(uses)
    for name, declared in stage.inputs.items():
        assert not declared.types or "dataset" in declared.kinds, name
    if stage.dataset_types is not None and uses != "normalize":
        known = dict.fromkeys(stage.inputs, "prompt_completion")
        said = stage.dataset_types(None, known)
        assert said and said.keys() <= {name for name, kind in stage.outputs.items() if kind == "dataset"}


def test_what_kept_no_tokens_is_no_rollouts(folder: Path) -> None:
    """Said before the training that comes first; what `normalize` reads may be rollouts, so nothing is said of it."""
    rewards = ["exact_match"]
    inputs = {"model": "./model", "dataset": "./rows"}
    policy = {"uses": "rl", "inputs": inputs, "with": {"rewards": rewards, "train_batch_size": 8, "max_steps": 1}}
    drawn = {"uses": "sample", "inputs": inputs, "with": {"rewards": rewards}}

    def again(rollouts: str, **settings: Any) -> dict[str, Any]:
        return {"uses": "rescore", "inputs": {"rollouts": rollouts, "dataset": "./rows"}, "with": settings}

    stages = {
        "drawn": drawn,
        "wrong": again("drawn"),
        "policy": policy,
        "right": again("policy.rollouts", outputs=["rollouts", "pairs"], threshold=1),
        "twice": again("right"),
        "pairs": again("right.pairs"),
        "read": {"uses": "normalize", "with": {"source": {"path": "rows.jsonl"}, "type": "prompt_completion"}},
        "perhaps": again("read"),
    }
    what = "has no tokens with the log-probabilities that they were drawn with; wire in output `rollouts` of a stage "
    assert problems(folder, stages) == {
        "wrong.inputs.rollouts": f"drawn.completions (sample) {what}rl or rescore",
        "pairs.inputs.rollouts": f"right.pairs (rescore) {what}rl or rescore",
    }


def test_an_output_that_a_setting_asks_for_is_named_with_it(folder: Path) -> None:
    inputs = {"model": "./model", "dataset": "rows"}
    stages = {
        "rows": normalize("prompt_completion"),
        "sft": {"uses": "sft", "inputs": {**inputs, "eval_dataset": "rows.test"}, "with": {"lora_r": 2}},
        "one": {"uses": "merge_adapter", "inputs": {"adapter": "sft"}},
        "two": {"uses": "merge_adapter", "inputs": {"adapter": "sft.adapter"}},
    }
    with pytest.raises(RequestError) as error:
        problems(folder, stages)
    assert {found.where.removeprefix("recipe: stages."): found.what for found in error.value.problems} == {
        "sft.inputs.eval_dataset": "stage 'rows' has no output 'test'; it writes: train; with test_size also test",
        "one.inputs.adapter": "takes an adapter, but sft.model is a model; with merge_adapters: false also an adapter",
        "two.inputs.adapter": "stage 'sft' has no output 'adapter'; it writes: model; with merge_adapters: false also "
        "adapter",
    }


def test_states_and_references_of_other_limits(folder: Path) -> None:
    inputs = {"model": "./model", "dataset": "./rows"}
    stages = {
        "states": {"uses": "teacher_states", "inputs": inputs, "with": {"max_length": 12}},
        "small": {
            "uses": "distill",
            "inputs": {**inputs, "teacher_states": "states"},
            "with": {"lmbda": 0.0, "max_length": 10},
        },
        "reference": {
            "uses": "reference_logprobs",
            "inputs": {"model": "./model", "dataset": "./pairs"},
            "with": {"truncation_mode": "keep_end"},
        },
        "dpo": {
            "uses": "preference",
            "inputs": {"model": "./model", "dataset": "./pairs", "reference_logprobs": "reference"},
        },
    }
    assert problems(folder, stages) == {
        "small.with.max_length": "is 10, but states made input teacher_states with max_length 12, which cuts rows "
        "elsewhere: give both the same",
        "dpo.with.truncation_mode": "is keep_start, but reference made input reference_logprobs with truncation_mode "
        "keep_end, which cuts rows elsewhere: give both the same",
    }


def test_completions_as_long_as_the_context(folder: Path) -> None:
    """64 tokens, by the model's folder and by the settings of the stage that makes one."""
    config = json.loads((folder / "model" / "config.json").read_text())
    small = {"hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 30, "vocab_size": 300}
    inputs = {"dataset": "./rows"}
    longest = config["max_position_embeddings"]
    stages = {
        "base": {"uses": "init_model", "inputs": inputs, "with": small},
        "grpo": {
            "uses": "rl",
            "inputs": {"model": "base", **inputs},
            "with": {"rewards": ["math"], "max_completion_length": 30},
        },
        "fits": {
            "uses": "rl",
            "inputs": {"model": "base", **inputs},
            "with": {"rewards": ["math"], "max_completion_length": 29},
        },
        "drawn": {
            "uses": "sample",
            "inputs": {"model": "./model", **inputs},
            "with": {"rewards": ["math"], "max_completion_length": longest},
        },
    }
    room = "so there is no room for a prompt; lower it"
    assert problems(folder, stages) == {
        "grpo.with.max_completion_length": f"is 30, but the model takes 30 tokens in all, {room}",
        "drawn.with.max_completion_length": f"is {longest}, but the model takes {longest} tokens in all, {room}",
    }


def test_packages_that_are_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another interpreter runs the stage, it looks itself."""
    monkeypatch.setattr(stage_module.importlib.util, "find_spec", lambda name: None if name != "wandb" else name)
    inputs = {"model": "./model", "dataset": "./rows"}
    asked = {"report_to": ["tensorboard", "wandb"]}
    stages = {
        "sft": {"uses": "sft", "inputs": inputs, "with": asked},
        "small": {"uses": "sft", "inputs": inputs, "with": {"optim": "adamw_8bit"}},
        "held": {"uses": "sample", "inputs": inputs, "with": {"outputs": ["completions"], **HELD}},
        "contest": {"uses": "nash_md", "inputs": inputs, "with": {"rewards": ["math"], **HELD}},
        "taught": {"uses": "distill", "inputs": inputs | {"teacher": "./model"}, "with": HELD},
        "apart": {"uses": "evaluate", "inputs": inputs, "with": {"rollouts": {"engine": "vllm_server"}, **HELD}},
    }
    missing, structured = "which is not installed: pip install", "'posttrain[structured]'"
    assert problems(folder, stages) == {
        "sft.with.report_to": f"needs the package tensorboard, {missing} 'posttrain[trackers]', or leave it out",
        **{
            f"{name}.with.structured": f"needs the package llguidance, {missing} {structured}, or leave it out"
            for name in ("held", "contest", "taught")  # vLLM brings it
        },
        "small.with.optim": f"needs the package bitsandbytes, {missing} 'posttrain[bitsandbytes]', or leave it out",
    }


def test_a_limit_below_what_is_held_out() -> None:
    given = {"source": {"path": "rows.jsonl"}, "limit": 400, "test_size": 5000}
    with pytest.raises(RequestError, match="limit 400 leaves no row to train on beside test_size 5000; raise limit or"):
        Recipe.from_dict({"name": "wrong", "stages": {"rows": {"uses": "normalize", "with": given}}})


def test_columns_that_rewards_ask_for(folder: Path) -> None:
    """Of rows that are there; of those that are still to be made the stage says it."""
    (folder / "checks.py").write_text("def right(completions, answer, **columns): return [1.0] * len(answer)\n")
    rewards = {"rewards": ["checks.py:right"]}
    stages = {
        "rows": normalize("prompt_completion"),
        "made": {"uses": "evaluate", "inputs": {"model": "./model", "dataset": "rows"}, "with": rewards},
        "there": {"uses": "evaluate", "inputs": {"model": "./model", "dataset": "./rows"}, "with": rewards},
        "fits": {
            "uses": "evaluate",
            "inputs": {"model": "./model", "dataset": "./rows"},
            "with": {"rewards": ["math"]},
        },
    }
    assert problems(folder, stages) == {
        "there.with.rewards": "input dataset (./rows): reward 'right' asks for column answer; the rows have completion"
        ": keep it, or give it that name, in normalize"
    }


def test_a_judge_without_address_or_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from the environment; the address may stand in `launch`."""
    judge = {"name": "judge", "parameters": {"model": "m"}}
    stage = {"uses": "evaluate", "inputs": {"model": "./model", "dataset": "./rows"}, "with": {"rewards": [judge]}}
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    said = problems(folder, {"asked": stage})
    assert list(said) == ["asked.with.rewards"] and "OPENAI_BASE_URL, which is not set" in said["asked.with.rewards"]
    there = {**stage, "launch": {"env": {"OPENAI_BASE_URL": "http://localhost:8000/v1"}}}
    assert problems(folder, {"asked": there}) == {}
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY, which is not set" in problems(folder, {"asked": there})["asked.with.rewards"]


def test_who_only_asks_needs_no_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan may be looked at on another machine than the one that it is run on; it says what would be lacking."""
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    (folder / "recipe.yaml").write_text(
        "stages:\n"
        "  rows: {uses: normalize, with: {source: {path: rows.jsonl}}}\n"
        "  asked:\n"
        "    uses: evaluate\n"
        "    inputs: {model: ./model, dataset: ./rows}\n"
        "    with: {rewards: [{name: judge, parameters: {model: m}}]}\n"
    )
    recipe, store = str(folder / "recipe.yaml"), ["--store", str(folder / "store")]
    assert main(["why", "rows", "--recipe", recipe, *store]) == 0
    capsys.readouterr()
    assert main(["plan", recipe, "--json", *store]) == 0
    [lacking] = json.loads(capsys.readouterr().out)["lacking"]
    assert (
        lacking["where"].endswith("recipe.yaml:6: stages.asked.with.rewards") and "OPENAI_BASE_URL" in lacking["what"]
    )
    assert main(["plan", recipe, *store]) == 0
    told = " ".join(capsys.readouterr().out.split())  # it is wrapped
    assert f"here a run would be refused: {lacking['where']}: {lacking['what']}" in told
    assert main(["run", recipe, *store]) == 2
    assert main(["sweep", recipe, "--over", "asked.max_completion_length=4,8", *store]) == 2
    assert lacking["what"] in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    assert main(["plan", recipe, *store]) == 0
    assert "refused" not in capsys.readouterr().out
