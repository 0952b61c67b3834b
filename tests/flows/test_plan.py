"""Plans: the decision for each stage and its reason, for every kind of change."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from artifacts import Record, open_store
from artifacts.errors import RequestError
from artifacts.retention import DAY, Policy
from artifacts.survey import survey
from artifacts.sweep import sweep
from flows.plan import plan
from flows.recipe import Recipe
from flows.run import Run
from tests.flows.recipe_stages import STAGES

pytestmark = pytest.mark.usefixtures("fake_stages")

RECIPE = """\
name: small
stages:
  data:
    uses: prepare
    with: {source: {path: rows.jsonl}, split: 0.5}
  sft:
    uses: train
    inputs: {model: ./base, dataset: data}
    with: {learning_rate: 1.0e-3, rewards: ["rewards.py:check"]}
  reference:
    uses: score
    inputs: {model: sft, dataset: data.test}
  dpo:
    uses: train
    inputs: {model: sft, dataset: data, reference: reference}
    with: {beta: 0.1}
"""


class World:
    """A recipe in a folder, a store, and a stand-in for running stages: each writes its fingerprint, or `content`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = open_store(str(folder / "store"))
        self.content: dict[str, str] = {}
        self.runs = 0
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        (folder / "rows.jsonl").write_text("{}\n")
        (folder / "rewards.py").write_text("def check(prompts, completions):\n    return [1.0]\n")
        (folder / "recipe.yaml").write_text(RECIPE)

    def recipe(self, *overrides: str) -> Recipe:
        return Recipe.load(self.folder / "recipe.yaml", overrides)

    def plan(self, *overrides: str, **options):
        return plan(self.recipe(*overrides), self.store, **options)

    def states(self, *overrides: str, **options) -> dict[str, str]:
        return {name: found.state for name, found in self.plan(*overrides, **options).decisions.items()}

    def reasons(self, stage: str, *overrides: str, **options) -> tuple[str, ...]:
        return self.plan(*overrides, **options).decisions[stage].reasons

    def run(self, *overrides: str, **options) -> list[str]:
        """Do what the plan says, deciding each stage again when its turn comes. The stages that ran."""
        self.runs += 1
        made = self.plan(*overrides, **options)
        outputs, ran = {}, []
        for name in made.recipe.stages:
            decision = made.decisions[name]
            if decision.state != "skipped":
                decision = made.decide(name, outputs)
            if decision.record is None and decision.state != "skipped":
                ran.append(name)
                self.finish(made, decision)
                decision = replace(decision, record=self.store.lookup(self.uses(made, name), decision.fingerprint))
            outputs[name] = decision.outputs
        return ran

    def uses(self, made, name: str) -> str:
        return made.recipe.stages[name].uses.name

    def finish(self, made, decision) -> None:
        stage = made.recipe.stages[decision.stage]
        outputs = {}
        for output, kind in stage.uses.outputs_of(stage.config).items():
            folder = self.folder / "out" / decision.stage / output
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "content").write_text(output + self.content.get(decision.stage, decision.fingerprint))
            outputs[output] = self.store.put(kind, folder, producer=decision.identity)
        provenance = {"run": f"run-{self.runs}", "recipe": made.recipe.name, "stage_name": decision.stage}
        provenance["finished_at"] = time.time()
        self.store.append_record(
            Record(stage.uses.name, decision.fingerprint, decision.identity, outputs, provenance=provenance)
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


FIRST = ("first run",)


def test_an_empty_store_runs_everything(world):
    assert world.states() == dict.fromkeys(("data", "sft", "reference", "dpo"), "run")
    assert world.reasons("data") == FIRST
    assert world.reasons("dpo") == FIRST


def test_what_was_done_is_cached_whoever_asks(world):
    assert world.run() == ["data", "sft", "reference", "dpo"]
    assert set(world.states().values()) == {"cached"}
    assert world.reasons("dpo") == ("done by run run-1",)
    assert world.run() == []
    again = plan(world.recipe("name=other"), open_store(world.store.url))
    assert {decision.state for decision in again.decisions.values()} == {"cached"}


def test_a_changed_field_reruns_its_stage_and_nothing_else(world):
    world.run()
    assert world.states("dpo.beta=0.2") == {
        "data": "cached", "sft": "cached", "reference": "cached", "dpo": "run",
    }  # fmt: skip
    assert world.reasons("dpo", "dpo.beta=0.2") == ("with.beta: 0.1 -> 0.2",)
    assert world.run("dpo.beta=0.2") == ["dpo"]
    assert world.reasons("dpo", "dpo.beta=0.3", "dpo.num_train_epochs=2") == (
        "with.num_train_epochs: 1 -> 2",
        "with.beta: 0.2 -> 0.3",
    )


def test_an_operational_field_and_launch_rerun_nothing(world):
    world.run()
    assert set(world.states("dpo.checkpoint_steps=7", "dpo.launch.processes=2").values()) == {"cached"}


def test_stages_after_one_that_runs_may_run_and_name_the_root(world):
    world.run()
    found = world.plan("sft.learning_rate=2e-3").decisions
    assert {name: decision.state for name, decision in found.items()} == {
        "data": "cached", "sft": "run", "reference": "may_run", "dpo": "may_run",
    }  # fmt: skip
    assert found["sft"].reasons == ("with.learning_rate: 0.001 -> 0.002",)
    # no dependent says again what the row of sft says
    assert found["reference"].reasons == ("input sft may change",)
    assert found["dpo"].reasons == ("input sft may change", "input reference may change (sft will run)")
    assert found["dpo"].fingerprint is None
    both = world.plan("sft.learning_rate=2e-3", "dpo.beta=0.2").decisions["dpo"]
    assert both.state == "run"  # whatever sft writes, beta is new
    assert both.reasons[0] == "with.beta: 0.1 -> 0.2"


def test_equal_bytes_leave_what_follows_cached(world):
    world.content["sft"] = "the same weights"
    world.run()
    assert world.run("sft.learning_rate=2e-3") == ["sft"]
    world.content["sft"] = "other weights"
    assert world.run("sft.learning_rate=3e-3") == ["sft", "reference", "dpo"]


def test_going_back_finds_everything_cached(world):
    world.run()
    world.run("sft.learning_rate=2e-3")
    assert set(world.states().values()) == {"cached"}
    # sft is cached under both settings, so the reason of dpo lies in what was made of it
    world.run("dpo.beta=0.5")
    found = world.plan("sft.learning_rate=2e-3", "dpo.beta=0.5").decisions
    assert found["sft"].state == "cached"
    assert found["dpo"].state == "run"
    assert found["dpo"].reasons == ("with.beta: 0.1 -> 0.5",)


def test_changed_inputs_are_followed_to_their_cause(world, tmp_path):
    world.run()
    world.run("sft.learning_rate=2e-3", until=["sft"])
    assert world.reasons("reference", "sft.learning_rate=2e-3") == ("input sft changed",)
    (tmp_path / "base" / "config.json").write_text('{"architectures": ["OtherForCausalLM"]}')
    (reason,) = world.reasons("sft")
    assert reason.startswith("input model: ")


def test_changed_data_and_code_are_named(world, tmp_path):
    world.run()
    (tmp_path / "rows.jsonl").write_text("{}\n{}\n")
    assert world.reasons("data") == ("data of rows.jsonl changed",)
    assert world.reasons("sft") == ("input data may change",)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "rewards.py").write_text("def check(prompts, completions):\n    return [0.0]\n")
    assert world.reasons("sft") == ("code of rewards.py:check changed",)


def test_a_raised_version_reruns(world, monkeypatch):
    world.run()
    raised = replace(STAGES[1], version=2)
    monkeypatch.setattr(sys.modules["stages.train"], "STAGE", raised)
    assert world.reasons("sft") == ("stage version 1 -> 2",)


def test_damaged_output_reruns(world):
    world.run()
    record = world.plan().decisions["dpo"].record
    (model,) = record.outputs.values()
    (world.store.materialize(model) / "content").unlink()
    decision = world.plan().decisions["dpo"]
    assert decision.state == "run"
    assert decision.reasons == (f"its result is damaged: model {model.id[:15]}",)


def test_what_gc_deleted_is_told_from_what_is_lost(world):
    world.run()
    made = world.plan()
    there = open_store(world.store.url)
    there.files.now = lambda: world.store.files.now() + DAY  # older than the day that everything is spared
    sweep(there, survey(there, Policy(keep_runs=0, keep_days=0, grace_hours=1)), "gc")
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    assert world.reasons("data") == (f"its result was deleted by gc on {today}",)  # once for both of its outputs
    assert set(world.reasons("reference")) == {"input data may change", "input sft may change (data will run)"}
    assert world.run() == ["data", "sft", "reference", "dpo"]
    assert set(world.states().values()) == {"cached"}
    # taken away by hand: gc is not named, though it once deleted the same artifact
    (model,) = made.decisions["dpo"].outputs.values()
    world.store.files.remove(model.key)
    assert world.reasons("dpo") == (f"its result is gone from the store: model {model.id[:15]}",)


def test_force_reruns_and_what_follows_may(world):
    world.run()
    found = world.plan(force=["sft"]).decisions
    assert (found["sft"].state, found["sft"].reasons) == ("run", ("forced",))
    assert found["dpo"].state == "may_run"
    assert found["dpo"].reasons == ("input sft may change", "input reference may change (sft will run)")
    assert world.run(force=["sft"]) == ["sft"]  # the same bytes again


def test_a_checkpoint_or_shards_are_taken_up(world, tmp_path):
    key = world.plan().decisions["data"].fingerprint
    world.store.shards(key).save("part-0", b"x")
    found = world.plan().decisions["data"]
    assert (found.state, found.step, found.reasons) == ("resume", None, (*FIRST, "1 shards are done"))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    world.store.checkpoints(key).save(40, folder)
    found = world.plan().decisions["data"]
    assert (found.state, found.step) == ("resume", 40)
    assert found.summary() == f"resume at step 40: {FIRST[0]}; a checkpoint is there"


def test_a_stage_of_several_outputs_keeps_its_names_and_their_order(world):
    """Records list outputs by name; the bare name means the first that the stage declares, ran or cached."""
    world.run()
    run = Run(world.plan())
    run.execute("data")
    record = world.plan().decisions["data"].record
    assert list(record.outputs) == ["test", "train"]
    assert list(run.entries["data"]["outputs"]) == ["train", "test"]
    assert world.store.alias("small/data") == world.store.alias("small/data.train") == record.outputs["train"]
    assert world.store.alias("small/data.test") == record.outputs["test"]


def test_selections(world):
    with pytest.raises(RequestError) as refused:
        world.plan(only=["dpo"])
    assert str(refused.value).splitlines() == [
        f"--only dpo: dpo reads from {need}, which is not selected and whose result is not in the store "
        f"({FIRST[0]}); run with --until {need} first, or without --only"
        for need in ("sft", "data", "reference")
    ]
    assert world.states(until=["sft"]) == {
        "data": "run", "sft": "run", "reference": "skipped", "dpo": "skipped",
    }  # fmt: skip
    world.run()
    assert world.states("dpo.beta=1", only=["dpo"]) == {
        "data": "skipped", "sft": "skipped", "reference": "skipped", "dpo": "run",
    }  # fmt: skip
    assert world.run("dpo.beta=1", only=["dpo"]) == ["dpo"]
    assert world.states(start=["reference"], force=["reference"]) == {
        "data": "skipped", "sft": "skipped", "reference": "run", "dpo": "may_run",
    }  # fmt: skip
    assert world.states(start=["sft"], until=["reference"])["dpo"] == "skipped"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"only": ["dop"]},
         "--only dop: the recipe has no such stage; did you mean 'dpo'?; there are: data, sft, reference, dpo"),
        ({"only": ["dpo"], "start": ["sft"]},
         "--only: cannot be combined with --from or --until; give one or the other"),
        ({"start": ["dpo"], "until": ["data"]},
         "--from dpo --until data: no stage is left to run; there are: data, sft, reference, dpo"),
        ({"until": ["sft"], "force": ["dpo"]},
         "--force dpo: not among the stages of --until sft --force dpo"),
    ],
)  # fmt: skip
def test_wrong_selections(world, options, expected):
    with pytest.raises(RequestError) as refused:
        world.plan(**options)
    assert str(refused.value) == expected


def test_references_to_the_store(world):
    world.run()
    model = world.plan().decisions["sft"].record.outputs["model"]
    world.store.set_alias("team/sft", model)
    assert world.states("dpo.inputs.model='@team/sft'")["dpo"] == "cached"
    assert world.states(f"dpo.inputs.model='@{model.id}'")["dpo"] == "cached"
    with pytest.raises(RequestError) as refused:
        world.plan("dpo.inputs.model='@team/stf'", "dpo.inputs.dataset='@team/sft'")
    first, second = map(str, refused.value.problems)
    assert first.startswith("--set dpo.inputs.model='@team/stf': stages.dpo.inputs.model: ")
    assert "team/sft" in first
    assert second == (
        "--set dpo.inputs.dataset='@team/sft': stages.dpo.inputs.dataset: takes a dataset, but @team/sft is a model"
    )


def test_a_first_run_is_compared_with_nothing(world):
    """Another stage of the kind, of this recipe or of another one, has nothing to do with it."""
    world.run()
    (world.folder / "recipe.yaml").write_text(RECIPE.replace("  dpo:\n", "  other:\n"))
    assert world.reasons("other", "other.beta=0.7") == FIRST
    assert world.reasons("sft", "name=copy", "sft.learning_rate=2e-3") == FIRST
    # the inputs of this one are not known yet, but no input can make it one that was done
    other = world.plan("sft.learning_rate=2e-3", "other.beta=0.7").decisions["other"]
    assert (other.state, other.reasons) == ("run", FIRST)
    # this one was done with some inputs, under another name: with those that come it may be cached
    renamed = world.plan("sft.learning_rate=2e-3").decisions["other"]
    assert (renamed.state, renamed.reasons[0]) == ("may_run", "input sft may change")


def test_of_many_changes_a_few_are_named(world):
    world.run()
    changed = ("dpo.beta=0.2", "dpo.num_train_epochs=2", "dpo.learning_rate=1e-4", "dpo.max_grad_norm=2")
    reasons = world.reasons("dpo", *changed, "sft.learning_rate=2e-3")
    assert reasons == (
        "with.learning_rate: 2e-05 -> 0.0001",
        "with.num_train_epochs: 1 -> 2",
        "with.max_grad_norm: 1.0 -> 2.0",
        "and 1 more",
        "input sft may change",
        "input reference may change (sft will run)",
    )


def test_a_change_further_back_names_the_stage_where_it_begins(world):
    """data changes, and sft with it; both have run, so of reference the input alone is other."""
    world.run()
    world.run("data.split=0.25", until=["sft"])
    assert set(world.reasons("reference", "data.split=0.25")) == {"input sft changed (data did)", "input data changed"}


def test_what_was_done_long_ago_is_found_by_its_name(world, monkeypatch):
    """Of a kind of stage the newest records are looked at; a recipe's own are reached through its aliases."""
    monkeypatch.setattr("flows.history.RECENT", 2)
    world.run()
    for name, decision in world.plan().decisions.items():
        world.store.set_alias(f"small/{name}", next(iter(decision.outputs.values())))
    for number in range(3):
        identity = {**world.plan().decisions["sft"].identity, "version": 100 + number}
        provenance = {"recipe": "other", "stage_name": "other"}
        world.store.append_record(Record("train", f"{number:064x}", identity, provenance=provenance))
    assert world.reasons("sft", "sft.learning_rate=2e-3") == ("with.learning_rate: 0.001 -> 0.002",)
    (world.folder / "rows.jsonl").write_text("{}\n{}\n")
    world.content["sft"] = "other"
    world.run(until=["sft"])
    assert "input sft changed (data did)" in world.reasons("dpo")
