"""Recipes that are wrong: every mistake is named with file, line, what was expected and what was found.

The messages are written out as they are shown.
"""

from __future__ import annotations

import pytest

from artifacts.errors import RequestError
from flows.recipe import Recipe
from tests.flows.recipe_stages import TRAIN, mistakes, with_stage

pytestmark = pytest.mark.usefixtures("fake_stages")


def test_unknown_stage(write_recipe, model_folder):
    assert mistakes(write_recipe(with_stage("    uses: trian\n"))) == [
        "recipe.yaml:4: stages.dpo.uses: unknown stage 'trian'; did you mean 'train'?; there are: prepare, train, score"
    ]


def test_inputs_of_an_unknown_stage_are_checked_in_the_same_go(write_recipe, model_folder):
    """What such a stage takes is not known; whether what is named exists is."""
    text = """\
stages:
  data: {uses: prepare, with: {source: {path: rows.jsonl}}}
  dpo:
    uses: trian
    inputs: {model: stf, dataset: [data.test, data], reference: 3, other: owner/name, last: ./nowhere}
"""
    assert mistakes(write_recipe(text))[1:] == [
        "recipe.yaml:5: stages.dpo.inputs.model: no stage 'stf' in this recipe; expected an artifact: a stage of this "
        "recipe, an @alias or @sha256:... of the store, a Hub name or a folder",
        "recipe.yaml:5: stages.dpo.inputs.dataset[0]: stage 'data' has no output 'test'; it writes: train",
        "recipe.yaml:5: stages.dpo.inputs.reference: expected an artifact: a stage of this recipe, an @alias or "
        "@sha256:... of the store, a Hub name or a folder, found 3",
        "recipe.yaml:5: stages.dpo.inputs.last: no such folder: nowhere",
    ]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("bta", "unknown key; did you mean 'beta'?"),
        ("lr", "unknown key; here it is `learning_rate` (Axolotl)"),
        ("pref_loss", "unknown key; here it is `loss_type` (LLaMA-Factory)"),
        ("save_steps", "unknown key; here it is `checkpoint_steps` (TRL)"),
        ("base_model", "unknown key; here it is `model` under `inputs:` (Axolotl)"),
        ("processes", "unknown key here; 'processes' belongs under `launch:`"),
        ("model", "unknown key here; 'model' belongs under `inputs:`"),
    ],
)
def test_misspelt_and_foreign_keys(write_recipe, model_folder, key, expected):
    text = with_stage(TRAIN + f"    with:\n      beta: 0.1\n      {key}: 1\n")
    assert mistakes(write_recipe(text)) == [f"recipe.yaml:8: stages.dpo.with.{key}: {expected}"]


def test_a_key_in_the_wrong_section(write_recipe, model_folder):
    assert mistakes(write_recipe(with_stage(TRAIN + "    beta: 0.1\n"))) == [
        "recipe.yaml:6: stages.dpo.beta: unknown key here; 'beta' belongs under `with:`"
    ]
    assert mistakes(write_recipe(with_stage(TRAIN) + "stage: {}\n")) == [
        "recipe.yaml:6: stage: unknown key; did you mean 'stages'?"
    ]


@pytest.mark.parametrize(
    ("written", "place", "expected"),
    [
        ('beta: "0.1"', "beta", "expected a number from 0 to 10, found text '0.1' (remove the quotes)"),
        ("beta: 11", "beta", "expected a number from 0 to 10, found 11"),
        ("beta: true", "beta", "expected a number from 0 to 10, found the boolean true"),
        ("learning_rate: 0", "learning_rate", "expected a number above 0, found 0"),
        ("learning_rate: .nan", "learning_rate", "nan is not a finite number"),
        ("num_train_epochs: 1.5", "num_train_epochs", "expected a whole number of at least 1, found 1.5"),
        ("num_train_epochs: true", "num_train_epochs",
         "expected a whole number of at least 1, found the boolean true"),
        ("loss_type: sigmod", "loss_type",
         "expected one of sigmoid, hinge, ipo, found text 'sigmod'; did you mean 'sigmoid'?"),
        ("betas: [0.9]", "betas[1]", "missing; expected a number"),
        ("betas: 0.9", "betas", "expected a list of 2: a number, a number, found 0.9"),
        ("betas: [0.9, x]", "betas[1]", "expected a number, found text 'x'"),
        ("max_grad_norm: -1", "max_grad_norm", "expected a number above 0 or null, found -1"),
        ("targets: 3", "targets", "expected text or a list of text, found 3 (put it in quotes)"),
        ("targets: [q, 3]", "targets[1]", "expected text, found 3 (put it in quotes)"),
        ("weights: [1, -2]", "weights[1]", "expected a number of at least 0, found -2"),
        ("weights: []", "weights", "expected a list of numbers of at least 0, at least 1 entry, found a list of 0"),
        ("bf16: yes", "bf16", "expected true or false, found text 'yes' (write true or false)"),
        ("beta:", "beta", "expected a number from 0 to 10, found null"),
        ("rewards: [a, b, c, d]", "rewards", "at most 3 rewards, found 4"),
    ],
)  # fmt: skip
def test_wrong_types_and_ranges(write_recipe, model_folder, written, place, expected):
    text = with_stage(TRAIN + f"    with:\n      {written}\n")
    assert mistakes(write_recipe(text)) == [f"recipe.yaml:7: stages.dpo.with.{place}: {expected}"]


def test_missing_fields_and_inputs(write_recipe, model_folder):
    assert mistakes(
        write_recipe("stages:\n  data:\n    uses: prepare\n    with: {source: {}}\n  dpo:\n    uses: train\n")
    ) == [
        "recipe.yaml:4: stages.data.with.source.path: missing; expected a file, folder or URL",
        "recipe.yaml:5: stages.dpo.inputs: input 'model' is missing; it takes a model: a stage of this recipe, "
        "an @alias or @sha256:... of the store, a Hub name or a folder",
        "recipe.yaml:5: stages.dpo.inputs: input 'dataset' is missing; it takes a dataset: a stage of this recipe, "
        "an @alias or @sha256:... of the store or a folder (./x)",
    ]


def test_a_cycle_is_named_in_the_direction_of_the_data(write_recipe, model_folder):
    text = with_stage(
        "    uses: train\n    inputs: {model: after, dataset: data}\n"
        "  after:\n    uses: train\n    inputs: {model: dpo, dataset: data}\n"
    )
    assert mistakes(write_recipe(text)) == [
        "recipe.yaml:5: stages.dpo.inputs: stages need each other in a circle: dpo -> after -> dpo; take one input out"
    ]
    alone = with_stage("    uses: train\n    inputs: {model: dpo, dataset: data}\n")
    assert mistakes(write_recipe(alone)) == [
        "recipe.yaml:5: stages.dpo.inputs: stages need each other in a circle: dpo -> dpo; take one input out"
    ]


def test_an_output_of_the_wrong_kind(write_recipe, model_folder):
    text = with_stage(
        TRAIN.replace("./model", "data") + "  third:\n    uses: score\n    inputs: {model: dpo, dataset: dpo}\n"
    )
    assert mistakes(write_recipe(text)) == [
        "recipe.yaml:5: stages.dpo.inputs.model: takes a model, but data.train is a dataset",
        "recipe.yaml:8: stages.third.inputs.dataset: takes a dataset, but dpo.model is a model",
    ]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("{model: dat, dataset: data}",
         "model: no stage 'dat' in this recipe; did you mean 'data'?; expected a model: a stage of this recipe, "
         "an @alias or @sha256:... of the store, a Hub name or a folder"),
        ("{model: ./model, dataset: data.tset}", "dataset: stage 'data' has no output 'tset'; it writes: train"),
        ("{model: ./model, dataset: data.test}", "dataset: stage 'data' has no output 'test'; it writes: train"),
        ("{model: [./model, ./model], dataset: data}", "model: takes one artifact, found a list of 2"),
        ("{model: ./model, dataset: []}",
         "dataset: an empty list; give at least one: a dataset: a stage of this recipe, an @alias or @sha256:... "
         "of the store or a folder (./x)"),
        ("{model: ./model, dataset: data, refrence: data}",
         "refrence: unknown input; did you mean 'reference'?; train takes: model, dataset, reference"),
        ("{model: ./modle, dataset: data}", "model: no such folder: modle"),
        ("{model: ./empty, dataset: data}",
         "model: empty is neither a model (it has no config.json), nor an adapter (no adapter_config.json), nor a "
         "dataset (no dataset.json)"),
        ("{model: ./model, dataset: ./model}", "dataset: takes a dataset, but ./model is a model"),
        ("{model: ./model, dataset: owner/rows}",
         "dataset: takes a dataset; a Hub name is a model; for data of the Hub use a normalize stage with "
         "`path: hub:owner/rows`"),
    ],
)  # fmt: skip
def test_references_that_lead_nowhere(write_recipe, model_folder, tmp_path, inputs, expected):
    (tmp_path / "empty").mkdir()
    found = mistakes(write_recipe(with_stage(f"    uses: train\n    inputs: {inputs}\n")))
    assert found == [f"recipe.yaml:5: stages.dpo.inputs.{expected}"]


def test_what_the_stage_itself_checks(write_recipe, model_folder):
    assert mistakes(write_recipe(with_stage(TRAIN + "    with: {loss_type: ipo}\n"))) == [
        "recipe.yaml:3: stages.dpo: loss_type ipo needs the input 'reference'; wire a stage that writes logprobs"
    ]


def test_missing_files_and_functions(write_recipe, model_folder):
    text = "stages:\n  data:\n    uses: prepare\n    with:\n      source: {path: row.jsonl}\n"
    text += "      filters: ['rewards.py:rihgt', 'missing.py:f', 'rewards.py:right']\n"
    found = mistakes(write_recipe(text))
    assert found == [
        "recipe.yaml:5: stages.data.with.source.path: no file or folder row.jsonl; did you mean 'rows.jsonl'?",
        "recipe.yaml:6: stages.data.with.filters[0]: rewards.py defines no function 'rihgt'; "
        "did you mean 'right'?; it has: right",
        "recipe.yaml:6: stages.data.with.filters[1]: no such Python file: 'missing.py' (looked for missing.py)",
    ]


def test_several_mistakes_are_listed_at_once(write_recipe, model_folder):
    text = (
        "name: [a]\nparallel: 0\nlaunch: {procesess: 2}\nstages:\n"
        "  data:\n    uses: prepare\n    with: {source: {path: rows.jsonl, colums: {}}, split: 1}\n"
        "  dpo:\n    uses: train\n    inputs: {modle: ./model, dataset: datta}\n    with: {beta: -1}\n"
        "    launch: {config: dpp}\n"
        "  2nd: 7\n"
    )
    found = mistakes(write_recipe(text))
    assert [line.split(": ")[:2] for line in found] == [
        ["recipe.yaml:1", "name"],
        ["recipe.yaml:2", "parallel"],
        ["recipe.yaml:3", "launch.procesess"],
        ["recipe.yaml:7", "stages.data.with.source.colums"],
        ["recipe.yaml:7", "stages.data.with.split"],
        ["recipe.yaml:10", "stages.dpo.inputs.modle"],
        ["recipe.yaml:10", "stages.dpo.inputs.dataset"],
        ["recipe.yaml:11", "stages.dpo.with.beta"],
        ["recipe.yaml:12", "stages.dpo.launch.config"],
        ["recipe.yaml:13", "stages.2nd"],
        ["recipe.yaml:13", "stages.2nd"],
    ]
    assert found[3].endswith("unknown key; did you mean 'columns'?")
    assert found[4].endswith("expected a number of at least 0 and below 1, found 1")
    assert found[8].endswith("; did you mean 'ddp'?")


def test_launch_settings(write_recipe, model_folder, tmp_path):
    (tmp_path / "my.yaml").write_text("distributed_type: MULTI_GPU\nnum_machines: 2\n")
    text = with_stage(TRAIN + "    launch: {config: ./my.yaml, env: {A: '1'}}\n") + "launch: {env: {A: '0', B: '2'}}\n"
    launch = Recipe.load(write_recipe(text)).stages["dpo"].launch
    assert launch.config == str(tmp_path / "my.yaml")
    assert launch.env == {"A": "1", "B": "2"}
    (tmp_path / "my.yaml").write_text("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}\n")
    (mistake,) = mistakes(write_recipe(with_stage(TRAIN + "    launch: {config: ./my.yaml}\n")))
    assert mistake.startswith("recipe.yaml:6: stages.dpo.launch.config: ") and "no fsdp_version: 2" in mistake
    text = with_stage(TRAIN + "    launch: {python: ./nope/python, env: {HF_TOKEN: abc, N: 1}}\n")
    assert mistakes(write_recipe(text)) == [
        "recipe.yaml:6: stages.dpo.launch.env.N: expected text, found 1 (put it in quotes)"
    ]
    assert mistakes(write_recipe(text.replace(", N: 1", ""))) == [
        "recipe.yaml:6: stages.dpo.launch.python: no such Python interpreter: './nope/python'; give its path",
        "recipe.yaml:6: stages.dpo.launch.env.HF_TOKEN: looks like a credential; set it in the environment "
        "and leave it out of the recipe",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe.yaml: expected a recipe, a mapping with the keys name, parameters, parallel, launch, stages; "
             "found null"),
        ("- a\n", "recipe.yaml:1: expected a recipe, a mapping with the keys name, parameters, parallel, launch, "
                  "stages; found a list of 1"),
        ("name: x\n", "recipe.yaml:1: stages: missing; expected a mapping of stage names to stages"),
        ("name: x\nstages: {}\n",
         "recipe.yaml:2: stages: found an empty mapping; expected a mapping of stage names to stages"),
        ("stages:\n\ta: 1\n",
         "recipe.yaml:2: not valid YAML: while scanning for the next token, found character '\\t' that cannot "
         "start any token (indent with spaces, not tabs)"),
        ("stages: {a: 1\n", "recipe.yaml:2: not valid YAML: while parsing a flow mapping, expected ',' or '}', "
                            "but got '<stream end>'"),
    ],
)  # fmt: skip
def test_files_that_are_no_recipe(write_recipe, text, expected):
    assert mistakes(write_recipe(text)) == [expected]


def test_recipes_by_name(tmp_path, monkeypatch):
    (tmp_path / "quickstart.yaml").write_text("stages:\n  s: {uses: prepare}\n")
    monkeypatch.setattr("flows.recipe_files.SHIPPED", tmp_path)
    with pytest.raises(RequestError, match=r"no recipe 'quikstart'; did you mean 'quickstart'\?; give a YAML file"):
        Recipe.load("quikstart")
    with pytest.raises(RequestError, match=r"no such recipe file: mine/quickstart\.yaml"):
        Recipe.load("mine/quickstart.yaml")
    with pytest.raises(RequestError, match=r"quickstart\.yaml:2: stages\.s\.with\.source: missing"):
        Recipe.load("quickstart")
