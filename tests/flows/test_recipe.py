"""Recipes that are right are read as meant."""

from __future__ import annotations

import re

import pytest

from artifacts.errors import RequestError
from flows.inputs import Folder, HubModel, StageOutput, Stored
from flows.recipe import Recipe
from tests.flows.recipe_stages import TRAIN, with_stage

pytestmark = pytest.mark.usefixtures("fake_stages")

GOOD = """\
name: small
parameters: {rate: 2e-5, base: owner/name}
launch: {threads: 1}
stages:
  data:
    uses: prepare
    with:
      source: {path: rows.jsonl}
      split: 0.1
  first:
    uses: train
    inputs: {model: "${base}", dataset: data}
    with: {learning_rate: "${rate}", num_train_epochs: 2}
    launch: {processes: 2, config: ddp}
  reference:
    uses: score
    inputs: {model: first, dataset: data.test}
  second:
    uses: train
    inputs: {model: first, dataset: [data, data.test], reference: reference}
    with: {loss_type: ipo, targets: [q_proj, v_proj]}
"""


def test_a_good_recipe_is_read_as_meant(write_recipe):
    recipe = Recipe.load(write_recipe(GOOD))
    assert recipe.name == "small"
    assert list(recipe.stages) == ["data", "first", "reference", "second"]
    first, second = recipe.stages["first"], recipe.stages["second"]
    assert first.config.learning_rate == 2e-5
    assert first.inputs == {"model": (HubModel("owner/name"),), "dataset": (StageOutput("data", "train"),)}
    assert second.inputs["dataset"] == (StageOutput("data", "train"), StageOutput("data", "test"))
    assert second.needs == ("first", "data", "reference")
    assert second.config.targets == ["q_proj", "v_proj"]
    assert (first.launch.processes, first.launch.config, first.launch.threads) == (2, "ddp", 1)
    assert (second.launch.processes, second.launch.threads) == (1, 1)
    assert recipe.stages["data"].config.source.path == str(recipe.path.parent / "rows.jsonl")


def test_stages_may_be_written_in_any_order(write_recipe):
    head, stages = GOOD.split("stages:\n")
    blocks = re.split(r"^(?=  \w)", stages, flags=re.MULTILINE)[1:]
    assert len(blocks) == 4
    recipe = Recipe.load(write_recipe(head + "stages:\n" + "".join(reversed(blocks))))
    order = list(recipe.stages)
    assert all(order.index(need) < order.index(name) for name in order for need in recipe.stages[name].needs)


def test_the_text_for_the_record_reads_back_to_the_same_recipe(write_recipe):
    recipe = Recipe.load(write_recipe(GOOD), ["rate=3e-4", "second.targets='1e3'"])
    again = Recipe.load(write_recipe(recipe.text))
    assert again.stages == recipe.stages
    assert again.text == recipe.text
    assert again.stages["second"].config.targets == "1e3"  # text that looks like a number stays text


def test_a_recipe_made_in_python(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    values = {"stages": {"data": {"uses": "prepare", "with": {"source": {"path": "rows.jsonl"}}}}}
    assert Recipe.from_dict(values, base=tmp_path).stages["data"].config.split == 0.0
    with pytest.raises(RequestError, match="only text, numbers, booleans, lists and dicts"):
        Recipe.from_dict({"name": tmp_path})
    with pytest.raises(RequestError) as refused:
        Recipe.from_dict(values, ["data.splt=0.1"], base=tmp_path)
    assert str(refused.value) == ("--set data.splt=0.1: stages.data.with.splt: unknown key; did you mean 'split'?")


def test_references_that_are_right(write_recipe, model_folder):
    text = with_stage("    uses: train\n    inputs: {model: '@team/best', dataset: ['@sha256:0123abcd', data]}\n")
    inputs = Recipe.load(write_recipe(text)).stages["dpo"].inputs
    assert inputs == {
        "model": (Stored("team/best"),),
        "dataset": (Stored("sha256:0123abcd"), StageOutput("data", "train")),
    }
    recipe = Recipe.load(write_recipe(with_stage(TRAIN)))
    assert recipe.stages["dpo"].inputs["model"] == (Folder(recipe.path.parent / "model", "./model"),)
