"""`posttrain why` and `posttrain diff`, against runs whose one change is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.flows.asked_runs import Asked, make_asked, source


def test_a_field_three_stages_up_is_named_with_old_and_new_value(asked: Asked, capsys):
    """rows -> sft -> more -> judge: `limit` of rows changes, and judge says so."""
    found = asked.ask(capsys, "why", "judge", "--recipe", str(asked.recipe), "--set", "rows.limit=30")
    assert found["state"] == "may_run"
    assert found["roots"] == [{"stage": "rows", "text": "with.limit: null -> 30"}]
    (model,) = [cause for cause in found["causes"] if cause["text"] == "input model may change"]
    path = []
    while model.get("because"):
        (model, *_) = model["because"]
        path.append((model["stage"], model["text"]))
    assert path == [
        ("more", "may run"),
        ("more", "input model may change"),
        ("sft", "may run"),
        ("sft", "input model may change"),
        ("base", "may run"),
        ("base", "input dataset may change"),
        ("rows", "will run"),
        ("rows", "with.limit: null -> 30"),
    ]
    assert (model["what"], model["name"], model["old"], model["new"]) == ("field", "limit", None, 30)
    shown = asked.show(capsys, "why", "judge", "--recipe", str(asked.recipe), "--set", "rows.limit=30")
    assert shown.endswith("it begins with\n  rows: with.limit: null -> 30\n")
    assert shown.count("with.limit: null -> 30") == 2  # the tree shows once what several ways lead to


def test_a_run_of_the_past_is_explained_by_the_records_before_it(asked: Asked, capsys):
    second = asked.runs[1]["run"]
    found = asked.ask(capsys, "why", "judge", "--run", "latest~1")
    assert (found["run"], found["state"], found["compared_with"]) == (second, "ran", asked.runs[0]["run"])
    assert found["roots"] == [{"stage": "sft", "text": "with.seed: 42 -> 1"}]
    first = asked.ask(capsys, "why", "judge", "--run", asked.runs[0]["run"])
    assert first["roots"] == [{"stage": "judge", "text": "first run"}]


def test_a_cached_stage_names_the_run_that_made_it_and_what_for(asked: Asked, capsys):
    found = asked.ask(capsys, "why", "judge")
    assert (found["state"], found["made_by"]) == ("cached", asked.runs[0]["run"])
    planned = asked.ask(capsys, "why", "sft", "--recipe", str(asked.recipe), "--set", "sft.seed=1")
    assert (planned["state"], planned["made_by"]) == ("cached", asked.runs[1]["run"])
    assert planned["roots"] == [{"stage": "sft", "text": "with.seed: 42 -> 1"}]


def test_changed_data_code_and_force(tmp_path: Path, capsys):
    """Content decides; the words name the file."""
    asked = make_asked(tmp_path)
    asked.run("judge.limit=4")
    plan = ("--recipe", str(asked.recipe), "--set", "judge.limit=4")
    code = tmp_path / "code.py"
    code.write_text(code.read_text() + "\n# a remark\n")
    assert asked.ask(capsys, "why", "judge", *plan)["roots"] == [
        {"stage": "judge", "text": "code of code.py:right changed"}
    ]
    asked.rows.write_text(source([(1, 1), (2, 3), (3, 5)]))
    roots = asked.ask(capsys, "why", "more", *plan)["roots"]
    assert roots == [{"stage": "rows", "text": "data of rows.jsonl changed"}]


def test_unknown_names_are_refused_with_the_nearest(asked: Asked, capsys):
    latest = asked.runs[2]["run"]
    there = "there are: rows, base, sft, more, judge"
    assert asked.show(capsys, "why", "jugde", status=2) == (
        f"posttrain: run {latest} has no stage 'jugde'; did you mean 'judge'?; {there}\n"
    )
    assert "did you mean 'sft'" in asked.show(capsys, "why", "stf", "--recipe", str(asked.recipe), status=2)
    assert asked.show(capsys, "why", "sft", "--run", "latest~3", status=2) == (
        f"posttrain: latest~3: there are 3 runs in {asked.store}; `posttrain ls` shows the newest\n"
    )
    assert asked.show(capsys, "diff", latest, "2", status=2).startswith("posttrain: '2' may be 3 runs: ")


def test_a_flipped_seed_is_the_only_cause(asked: Asked, capsys):
    found = asked.ask(capsys, "diff", "latest~2", "latest~1")
    assert [run["run"] for run in found["runs"]] == [run["run"] for run in asked.runs[:2]]
    assert found["causes"] == [{"what": "seed", "stages": ["sft"], "name": "seed", "old": 42, "new": 1}]
    assert found["surroundings"] == []
    assert {name: stage["differs"] for name, stage in found["stages"].items()} == {
        "rows": False, "base": False, "sft": True, "more": True, "judge": True,
    }  # fmt: skip
    before, after = (run["stages"]["sft"] for run in asked.runs[:2])
    assert found["stages"]["sft"]["metrics"]["loss"] == [before["metrics"]["loss"], after["metrics"]["loss"]]
    assert "model.safetensors" in found["stages"]["sft"]["files"]["model"]
    assert "config.json" not in found["stages"]["sft"]["files"]["model"]
    assert found["stages"]["sft"]["outputs"]["model"] == [
        before["outputs"]["model"]["id"], after["outputs"]["model"]["id"],
    ]  # fmt: skip


def test_equal_runs_differ_in_nothing(asked: Asked, capsys):
    found = asked.ask(capsys, "diff", asked.runs[0]["run"], "latest")
    assert (found["causes"], found["surroundings"]) == ([], [])
    assert not any(stage["differs"] for stage in found["stages"].values())
    shown = asked.show(capsys, "diff", asked.runs[0]["run"], "latest")
    assert "has the same recipe, data, code and seeds as" in shown


def test_hardware_wiring_and_new_stages_are_causes_of_the_recipe(tmp_path: Path, capsys):
    asked = make_asked(tmp_path)
    asked.run("judge.limit=4", "sft.micro_batch_tokens=64")
    text = asked.recipe.read_text().replace('"judge"', '"verdict"')
    asked.recipe.write_text(text)
    asked.run("verdict.limit=4", "sft.micro_batch_tokens=32", "verdict.inputs.model=base")
    found = asked.ask(capsys, "diff", "latest~1", "latest")
    names = {cause["name"] for cause in found["causes"]}
    assert "stages.sft.with.micro_batch_tokens" in names  # operational: no fingerprint shows it
    assert {"stages.judge.uses", "stages.verdict.uses"} <= names
    assert found["stages"]["judge"]["states"] == ["ran", None]
    assert found["stages"]["verdict"]["states"] == [None, "ran"]


@pytest.mark.parametrize("arguments", [("why",), ("diff", "latest"), ("why", "a", "b")])
def test_what_is_missing_is_said(arguments, capsys):
    from flows import cli

    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    assert left.value.code == 2
    assert f"posttrain {arguments[0]}" in capsys.readouterr().err or arguments == ("why", "a", "b")
