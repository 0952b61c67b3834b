"""`--set`, `${parameter}` and the reading of YAML."""

from __future__ import annotations

import json
import math

import pytest

from artifacts.errors import RequestError
from flows.recipe import Recipe
from flows.yaml_lines import dump, parse_document, parse_value
from tests.flows.recipe_stages import TRAIN, mistakes, with_stage

pytestmark = pytest.mark.usefixtures("fake_stages", "model_folder")

PARAMETERS = """\
parameters: {rate: 1.0e-3, base: ./model, layers: [q, v], part: rows, epochs: null}
stages:
  data:
    uses: prepare
    with: {source: {path: "${part}.jsonl"}}
  dpo:
    uses: train
    inputs: {model: "${base}", dataset: data}
    with: {learning_rate: "${rate}", targets: "${layers}", num_train_epochs: "${epochs}"}
"""


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("dpo.beta=0.2", lambda recipe: recipe.stages["dpo"].config.beta == 0.2),
        ("dpo.with.beta=2e-1", lambda recipe: recipe.stages["dpo"].config.beta == 0.2),
        ("dpo.targets=[q, v]", lambda recipe: recipe.stages["dpo"].config.targets == ["q", "v"]),
        ("dpo.max_grad_norm=", lambda recipe: recipe.stages["dpo"].config.max_grad_norm is None),
        ("dpo.betas.1=0.95", lambda recipe: recipe.stages["dpo"].config.betas == (0.8, 0.95)),
        ("data.source.columns={a: b}", lambda recipe: recipe.stages["data"].config.source.columns == {"a": "b"}),
        ("data.source.columns.x=y", lambda recipe: recipe.stages["data"].config.source.columns == {"x": "y"}),
        ("dpo.launch.processes=2", lambda recipe: recipe.stages["dpo"].launch.processes == 2),
        ("launch.threads=3", lambda recipe: recipe.stages["data"].launch.threads == 3),
        ("dpo.inputs.model=owner/other", lambda recipe: str(recipe.stages["dpo"].inputs["model"][0]) == "owner/other"),
        ("dpo.inputs.model=@mine/sft", lambda recipe: str(recipe.stages["dpo"].inputs["model"][0]) == "@mine/sft"),
        ("dpo.inputs.model='@mine/sft'", lambda recipe: str(recipe.stages["dpo"].inputs["model"][0]) == "@mine/sft"),
        ("parallel=2", lambda recipe: recipe.parallel == 2),
        ("name=mine", lambda recipe: recipe.name == "mine"),
    ],
)
def test_set(write_recipe, override, read):
    recipe = Recipe.load(write_recipe(with_stage(TRAIN + "    with: {betas: [0.8, 0.9]}\n")), [override])
    assert read(recipe)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dpp.beta=1", "nothing named 'dpp' can be set; did you mean 'dpo'?; there are the parameters (none) and "
                       "the stages data, dpo"),
        ("dpo=1", "'dpo' is a stage; say which of its fields: dpo.FIELD=VALUE"),
        ("dpo.beta", "expected NAME=VALUE, for example dpo.beta=0.2"),
        ("dpo.beta=[1", "not valid YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
        ("dpo.bta=1", "stages.dpo.with.bta: unknown key; did you mean 'beta'?"),
        ("dpo.beta=x", "stages.dpo.with.beta: expected a number from 0 to 10, found text 'x'"),
        ("dpo.beta.x=1", "stages.dpo.with.beta is 0.3, so nothing below it can be set"),
        ("dpo.launch.procesess=2", "stages.dpo.launch.procesess: unknown key; did you mean 'processes'?"),
        ("dpo.inputs.modle=data", "stages.dpo.inputs.modle: unknown input; did you mean 'model'?; "
                                  "train takes: model, dataset, reference"),
        ("dpo.betas.2=1", "'2' is no index of a list of 2; they start at 0"),
        ("parallel=0", "parallel: expected a whole number of at least 1, found 0"),
        ("name=a b", "name: expected letters, digits, '.', '_' and '-', beginning with a letter or digit, "
                     "found text 'a b'"),
    ],
)  # fmt: skip
def test_set_of_what_is_not_there(write_recipe, override, expected):
    path = write_recipe(with_stage(TRAIN + "    with: {beta: 0.3, betas: [0.8, 0.9]}\n"))
    assert mistakes(path, override) == [f"--set {override}: {expected}"]


def test_parameters_keep_their_type(write_recipe):
    recipe = Recipe.load(write_recipe(PARAMETERS), ["epochs=3", "rate=2e-4"])
    config = recipe.stages["dpo"].config
    assert (config.learning_rate, config.targets, config.num_train_epochs) == (2e-4, ["q", "v"], 3)
    assert recipe.stages["data"].config.source.path.endswith("/rows.jsonl")
    assert "${" not in recipe.text and "parameters" not in recipe.text


def test_a_parameter_without_default_must_be_given(write_recipe):
    assert mistakes(write_recipe(PARAMETERS)) == [
        "recipe.yaml:1: parameters.epochs: the parameter has no default and must be given: --set epochs=..."
    ]


def test_wrong_parameters(write_recipe):
    text = PARAMETERS.replace('"${rate}"', '"${raet}"').replace("${part}", "${layers}")
    assert mistakes(write_recipe(text), "epochs=1") == [
        "recipe.yaml:5: stages.data.with.source.path: ${layers} is a list of 2 and cannot stand inside a text",
        "recipe.yaml:9: stages.dpo.with.learning_rate: unknown parameter 'raet'; did you mean 'rate'?; "
        "the recipe has: rate, base, layers, part, epochs",
    ]
    text = PARAMETERS.replace("part: rows", "dpo: rows").replace("${part}", "${dpo}")
    assert mistakes(write_recipe(text), "epochs=1") == [
        "recipe.yaml:1: parameters.dpo: the name is taken by a stage or a key of the recipe; choose another"
    ]


def test_two_dollars_are_one():
    recipe = {"stages": {"s": {"uses": "score", "inputs": {"model": "@a", "dataset": "@b"}}}, "name": "$${x}"}
    with pytest.raises(RequestError, match=r"found text '\$\{x\}'"):
        Recipe.from_dict(recipe)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5), ("1E3", 1000.0), ("-.5", -0.5), ("1.", 1.0), ("010", 10), ("0x1f", 31), ("0o17", 15),
        ("yes", "yes"), ("NO", "NO"), ("on", "on"), ("off", "off"), ("True", True), ("false", False),
        ("1:30", "1:30"), ("2026-11-22", "2026-11-22"), ("1_000", "1_000"), ("~", None), ("null", None), ("", None),
        ("'2e-5'", "2e-5"), ("!!str 3", "3"), ("1e", "1e"), ("+7", 7), (".inf", math.inf), ("-.Inf", -math.inf),
    ],
)  # fmt: skip
def test_scalars_are_read_by_the_core_rules(text, value):
    read = parse_value(text, "value")
    assert read == value
    assert type(read) is type(value)
    assert parse_value(dump(value), "value") == value


def test_anchors_and_merges_keep_their_lines():
    document = parse_document("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n", "f.yaml")
    assert document.data == {"a": {"x": 1, "y": 2}, "b": {"y": 3, "x": 1}}
    assert document.where(("b", "y")) == "f.yaml:4: b.y"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: a: given twice; the first is in line 1; remove one"),
        ("a: {1: x}\n", "f.yaml:1: a: keys are text; found 1; write it in quotes if it is meant as text"),
        ("a: &a [*a]\n", "f.yaml:1: a[0]: an anchor contains itself"),
        ("a: !!python/name:os.system x\n",
         "f.yaml:1: a: the tag tag:yaml.org,2002:python/name:os.system means nothing here; write a plain value"),
        ("a: !!int x\n", "f.yaml:1: a: 'x' does not fit its tag !!int"),
        ("<<: 3\n", "f.yaml:1: `<<` takes a mapping that is defined elsewhere by an anchor"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: not valid YAML: expected a single document in the stream, "
                              "but found another document"),
    ],
)  # fmt: skip
def test_yaml_that_is_refused(text, expected):
    with pytest.raises(RequestError) as refused:
        parse_document(text, "f.yaml")
    assert str(refused.value) == expected


def test_aliases_cannot_blow_up():
    text = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for before, name in zip("abcde", "bcdef", strict=True):
        text += f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    with pytest.raises(RequestError, match="more than 100000 values, aliases expanded"):
        parse_document(text, "f.yaml")


def test_paths_count_from_the_folder_of_the_recipe_wherever_one_stands(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    for name in ("a", "b"):
        (folder / f"data/{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (folder / "code.py").write_text("def change(row):\n    return row\n")
    settings = {"source": {"path": "data/a.jsonl"}, "filters": ["code.py:change"]}
    body = {"uses": "prepare", "with": settings}
    (folder / "mine.yaml").write_text(json.dumps({"name": "mine", "stages": {"rows": body}}))
    for place, name in ((folder, "mine.yaml"), (tmp_path, "project/mine.yaml")):
        monkeypatch.chdir(place)
        for given, file in (([], "a"), (["rows.source.path=data/b.jsonl"], "b")):
            found = Recipe.load(name, given).stages["rows"].config
            assert found.source.path == str(folder / f"data/{file}.jsonl")
            assert found.filters == (f"{folder / 'code.py'}:change",)
