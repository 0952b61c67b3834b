"""One plan names the mistakes of the text, of the wiring, of what is read and of the command line, and none that only
follows from another."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from artifacts import open_store
from artifacts.errors import RequestError
from flows.cli import main
from flows.plan import plan_reading
from flows.recipe import read_recipe, read_values
from flows.recipe_files import shipped_recipes
from flows.yaml_lines import read_document
from tests.flows.test_plan import World
from tests.stages.small_models import save_dataset, save_model

ROWS = [{"prompt": "ab", "completion": "c"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with a model and a dataset, which has two names, and rows beside the recipe."""
    save_model(tmp_path / "model", seed=1)
    save_dataset(tmp_path / "rows", "prompt_completion", ROWS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    store = open_store(str(tmp_path / "store"))
    store.set_alias("mine/model", store.put("model", tmp_path / "model", producer={"stage": "init_model"}))
    rows = store.put("dataset", tmp_path / "rows", producer={"stage": "normalize"})
    store.set_alias("mine/mode", rows)
    store.set_alias("mine/rows", rows)
    return tmp_path


def said(folder: Path, stages: dict[str, Any], *arguments: str, store: str = "store", **top: Any) -> list[str]:
    """What `posttrain plan` lists as mistakes, without the folder."""
    (folder / "recipe.yaml").write_text(json.dumps({"name": "wrong", **top, "stages": stages}))
    reported: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.cli._say", reported.append)
        assert main(["plan", str(folder / "recipe.yaml"), "--store", str(folder / store), *arguments]) == 2
    text = reported[0].replace(f"{folder}/", "").replace("recipe.yaml:1: ", "")
    first, *more = text.splitlines()
    return [line.strip() for line in more] or [first.removeprefix("posttrain: ")]


def normalize(**values: Any) -> dict[str, Any]:
    return {"uses": "normalize", "with": {"source": {"path": "rows.jsonl"}, "type": "prompt_completion", **values}}


def sft(model: str, dataset: str, **values: Any) -> dict[str, Any]:
    return {"uses": "sft", "inputs": {"model": model, "dataset": dataset}, "with": values}


def test_a_name_that_is_none_may_have_meant_one_that_fits(folder: Path) -> None:
    """@mine/mode is a dataset: where a model is wanted, another name is nearest."""
    stages = {"a": sft("@mine/modl", "@mine/mdel"), "b": sft("@mine/mode", "@mine/rows"), "c": {"uses": "nothing"}}
    stages["c"]["inputs"] = {"model": "@mine/modl"}
    here = f"in {folder}/store".replace(f"{folder}/", "")
    ids = "an id is at least 8 hex digits, and `posttrain ls` shows all"
    found = said(folder, stages)
    assert found[:3] == [
        f"stages.a.inputs.model: there is no artifact '@mine/modl' {here}; did you mean @mine/model?; {ids}",
        f"stages.a.inputs.dataset: there is no artifact '@mine/mdel' {here}; did you mean @mine/mode?; {ids}",
        "stages.b.inputs.model: takes a model or an adapter, but @mine/mode is a dataset",
    ]
    assert found[3].startswith("stages.c.uses: unknown stage 'nothing'")
    assert found[4].startswith(f"stages.c.inputs.model: there is no artifact '@mine/modl' {here}; did you mean @mine/")
    assert len(found) == 5


def test_sizes_of_models_and_types_of_rows_beside_other_mistakes(folder: Path) -> None:
    """The model takes 64 tokens; a stage whose input is wrong makes nothing that others could be judged by."""
    dpo = {"uses": "preference", "inputs": {"model": "@mine/model", "dataset": "rows"}, "with": {"bet": 1}}
    drawn = {"uses": "sample", "inputs": {"model": "@mine/model", "dataset": "rows"}}
    judged = {"uses": "evaluate", "inputs": {"model": "lost", "dataset": "rows"}}
    stages = {
        "rows": normalize(limit=0),
        "dpo": dpo,
        "drawn": {**drawn, "with": {"rewards": ["math"], "max_completion_length": 4096, "sede": 1}},
        "lost": sft("@nope", "rows"),
        "judged": {**judged, "with": {"rewards": ["math"], "max_completion_length": 4096}},
    }
    found = said(folder, stages)
    assert [line.split(": ")[0] for line in found] == [
        "stages.rows.with.limit",
        "stages.dpo.inputs.dataset",
        "stages.dpo.with.bet",
        "stages.drawn.with.max_completion_length",
        "stages.drawn.with.sede",
        "stages.lost.inputs.model",
    ]
    assert found[1].startswith("stages.dpo.inputs.dataset: rows.train is a dataset of type prompt_completion")


def test_selections_and_settings_are_said_first_and_unused_parameters_last(folder: Path) -> None:
    stages = {"rows": normalize(limit=5), "fit": sft("@mine/model", "rows", learning_rat=1)}
    arguments = ("--set", "rows=48", "--set", "limit=3", "--set", "lr=1", "--set", "fit.max_steps=no", "--only", "ft")
    found = said(folder, stages, *arguments, parameters={"unused": 1})
    there = "there are the parameters unused and the stages rows, fit"
    assert found == [
        "--set rows=48: 'rows' is a stage; say which of its fields: rows.FIELD=VALUE",
        f"--set limit=3: nothing named 'limit' can be set; a field is set with its stage: rows.limit; {there}",
        f"--set lr=1: nothing named 'lr' can be set; a field is set with its stage: fit.learning_rate; {there}",
        "--only ft: the recipe has no such stage; did you mean 'fit'?; there are: rows, fit",
        "stages.fit.with.learning_rat: unknown key; did you mean 'learning_rate'?",
        "--set fit.max_steps=no: stages.fit.with.max_steps: expected a whole number above 0 or null, found text 'no'",
        "parameters.unused: nothing in the recipe uses it; write ${unused} where it belongs, or take it out",
    ]


def test_a_parameter_of_a_taken_name_is_the_recipes_mistake_whoever_sets_it(folder: Path) -> None:
    stages = {"rows": normalize(limit="${rows}")}
    what = "parameters.rows: the name is taken by a stage or a key of the recipe; choose another"
    assert said(folder, stages, "--set", "rows=3", parameters={"rows": 5}) == [what]


def test_a_result_that_is_not_there_is_not_said_where_its_stage_is_wrong(folder: Path) -> None:
    stages = {"rows": normalize(limt=5), "fit": sft("@mine/model", "rows")}
    assert said(folder, stages, "--only", "fit") == ["stages.rows.with.limt: unknown key; did you mean 'limit'?"]
    (line,) = said(folder, {**stages, "rows": normalize(limit=5)}, "--only", "fit")
    assert line.startswith("--only fit: fit reads from rows, which is not selected")


@pytest.mark.parametrize(
    ("store", "what"),
    [("rows.jsonl", "Not a directory; a file is where a folder should be"), ("/proc/x", "cannot be made in /proc")],
)
def test_a_store_that_is_none_beside_a_wrong_recipe(folder: Path, store: str, what: str) -> None:
    first, second = said(folder, {"rows": normalize(limt=5)}, store=store)
    assert first.startswith("--store ") and what in first
    assert second == "stages.rows.with.limt: unknown key; did you mean 'limit'?"
    (alone,) = said(folder, {"rows": normalize()}, store=store)
    assert alone == first


@pytest.mark.usefixtures("fake_stages")
def test_packages_are_not_asked_of_what_may_stay_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is cached; one slip further back does not make the stages after it need anything here."""
    world = World(tmp_path)
    world.run()
    monkeypatch.setattr("flows.plan_checks.missing_packages", lambda config: {"bf16": "needs the package x"})

    def places(*overrides: str) -> list[str]:
        with pytest.raises(RequestError) as refused:
            plan_reading(read_recipe(world.folder / "recipe.yaml", overrides), world.store)
        return [problem.where.rpartition("stages.")[2] for problem in refused.value.problems]

    assert places("sft.bta=1") == ["sft.with.bf16", "sft.with.bta"]
    assert places("sft.bta=1", "dpo.beta=0.3") == ["sft.with.bf16", "sft.with.bta", "dpo.with.bf16"]
    assert places("sft.launch.processes=0") == ["sft.launch.processes"]


def test_a_model_of_a_stage_that_is_not_selected_is_not_looked_up(folder: Path) -> None:
    stages = {"rows": normalize(), "fit": sft("@nope", "rows"), "again": sft("fit", "rows")}
    (folder / "recipe.yaml").write_text(json.dumps({"name": "wrong", "stages": stages}))
    read = read_recipe(folder / "recipe.yaml")
    states = {
        name: found.state
        for name, found in plan_reading(read, open_store(str(folder / "store")), only=["rows"]).decisions.items()
    }
    assert states == {"rows": "run", "fit": "skipped", "again": "skipped"}


def test_a_stage_that_writes_nothing_cannot_be_read_from(folder: Path) -> None:
    rescored = {"uses": "rescore", "inputs": {"rollouts": "@mine/rows"}, "with": {"rewards": ["math"], "outputs": []}}
    found = said(folder, {"none": rescored, "fit": sft("@mine/model", "none")})
    assert "stages.fit.inputs.dataset: stage 'none' writes nothing, as it is set" in found


def test_what_a_parameter_should_have_given_is_not_looked_for(folder: Path) -> None:
    stages = {"rows": normalize(source={"path": "${data}/rows.jsonl"}), "fit": sft("@mine/${data}", "rows")}
    what = "parameters.data: the parameter has no default and must be given: --set data=..."
    assert said(folder, stages, parameters={"data": None}) == [what]


WRONG: Any = (
    None,
    7,
    -1,
    "x",
    "@nope",
    [],
    ["a"],
    {},
    {"a": 1},
    True,
    "./absent",
    "sft",
    "no:thing",
    [[["x"]]],
)


def _hurt(values: Any, chance: random.Random) -> None:
    """Takes a value of these out, renames its key or puts something else there."""
    places = [place for place in _places(values) if place]
    *way, last = chance.choice(places)
    for part in way:
        values = values[part]
    kind = chance.randrange(4)
    if kind == 0:
        del values[last]
    elif kind == 1 and isinstance(values, dict):
        values[f"{last[:-2]}{last[-1]}"] = values.pop(last)
    else:
        values[last] = copy.deepcopy(chance.choice(WRONG))


def _places(values: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in entries:
        yield from _places(value, (*place, key))


@pytest.mark.parametrize("name", ["calculator", "engines", "online", "quickstart"])
def test_whatever_is_done_to_a_recipe_its_mistakes_are_named_once(name: str, tmp_path: Path) -> None:
    """Shipped recipes with one to four places hurt, the same in every run: nothing but mistakes is raised."""
    path, store, chance = shipped_recipes()[name], open_store(str(tmp_path)), random.Random(7)
    for _ in range(12):
        values = copy.deepcopy(read_document(path).data)
        for _ in range(chance.choice([1, 1, 2, 4])):
            _hurt(values, chance)
        try:
            read = read_values(values, base=path.parent)
            only = [chance.choice(list(read.recipe.needs))] if read.recipe.needs and chance.random() < 0.3 else []
            plan_reading(read, store, only=only)
        except RequestError as error:
            said = [str(problem) for problem in error.problems]
            assert said and len(set(said)) == len(said)
