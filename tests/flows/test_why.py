"""`posttrain why` and `posttrain diff`, against runs whose one change is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.flows.asked_runs import STAGES, Asked, make_asked, source
from tests.in_process import run_here
from tests.tiny_recipe import artifact_folder


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


def test_another_source_is_no_change_of_the_old_file(tmp_path: Path, capsys):
    asked = make_asked(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rows.jsonl").write_text(source([(1, 1), (2, 3)]))
    rows = {"rows": STAGES["rows"]}
    asked.recipe.write_text(json.dumps({"name": "small", "launch": {"threads": 1}, "stages": rows}))
    asked.run()
    asked.run("rows.source.path=other/rows.jsonl")
    expected = {"stage": "rows", "text": "with.source.path: rows.jsonl -> other/rows.jsonl"}
    assert asked.ask(capsys, "why", "rows")["roots"] == [expected]
    (tmp_path / "third.jsonl").write_text(source([(1, 1)]))
    plan = ("--recipe", str(asked.recipe), "--set", "rows.source.path=third.jsonl")
    assert asked.ask(capsys, "why", "rows", *plan)["roots"] == [
        {"stage": "rows", "text": "with.source.path: other/rows.jsonl -> third.jsonl"}
    ]


def test_without_a_run_it_is_the_newest_that_has_the_stage(tmp_path: Path, capsys):
    """Whatever ran since: of another recipe, or ended before it came to that stage."""
    asked = make_asked(tmp_path)
    asked.recipe.write_text(json.dumps({"name": "small", "launch": {"threads": 1}, "stages": {"rows": STAGES["rows"]}}))
    first = asked.run()["run"]
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps({"name": "other", "launch": {"threads": 1}, "stages": {"others": STAGES["rows"]}}))
    second = run_here(other, asked.store)["run"]
    found = asked.ask(capsys, "why", "rows")
    assert (found["run"], found["recipe"]) == (first, "small")
    assert f"in run {first} of recipe small" in asked.show(capsys, "why", "rows")
    assert f"ledger of run {second} of recipe other" in asked.show(capsys, "ledger")
    shown = asked.show(capsys, "why", "rows", "--run", "latest", status=2)
    assert shown == f"posttrain: run {second} has no stage 'rows'; there are: others\n"


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
    of_one = {name for name in names if name.startswith(("stages.judge", "stages.verdict"))}
    assert of_one == {"stages.judge.uses", "stages.verdict.uses"}  # not every line that only one recipe has
    assert found["stages"]["judge"]["states"] == ["ran", None]
    assert found["stages"]["verdict"]["states"] == [None, "ran"]


@pytest.mark.parametrize("fails_first", [True, False])
def test_a_stage_that_failed_in_one_run_differs_by_its_code_too(tmp_path: Path, capsys, fails_first: bool):
    """No record says what it was; the run does, whichever of the two it is."""
    asked = make_asked(tmp_path)
    good = (tmp_path / "code.py").read_text()
    bad = good.replace("return [", "raise ValueError('no judge') or [")
    for fails in (fails_first, not fails_first):
        (tmp_path / "code.py").write_text(bad if fails else good)
        payload = run_here(asked.recipe, asked.store, [f"judge.limit={4 if fails else 5}"])
        assert payload["stages"]["judge"]["state"] == ("failed" if fails else "ran")
    found = asked.ask(capsys, "diff", "latest~1", "latest")
    assert [(cause["what"], cause["stages"], cause["name"]) for cause in found["causes"]] == [
        ("field", ["judge"], "limit"),
        ("code", ["judge"], "rewards.0"),
    ]
    assert [found["causes"][0][side] for side in ("old", "new")] == ([4, 5] if fails_first else [5, 4])
    before, after = (found["causes"][1][side] for side in ("old", "new"))
    assert before["function"] == after["function"] == "right" and before["sha256"] != after["sha256"]


@pytest.mark.parametrize("arguments", [("why",), ("diff",), ("why", "a", "b")])
def test_what_is_missing_is_said(arguments, capsys):
    from flows import cli

    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    assert left.value.code == 2
    assert f"posttrain {arguments[0]}" in capsys.readouterr().err or arguments == ("why", "a", "b")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "sft.seed=2"), "--set sft.seed=2: changes a recipe, and none is named: give --recipe too"),
        (
            ("--recipe", "quickstart", "--run", "latest"),
            "--run latest: asks what a run did, and --recipe what one would do: leave one out",
        ),
    ],
)
def test_an_option_that_would_not_count_is_refused(arguments, said, tmp_path: Path, capsys):
    from flows import cli

    assert cli.main(["why", "sft", "--store", str(tmp_path / "store"), *arguments]) == 2
    assert capsys.readouterr().err == f"posttrain: {said}\n"


def test_many_runs_are_a_table_of_what_they_differ_in(asked: Asked, capsys):
    """The seed of sft is the only setting; numbers and intervals are those that the evaluations hold."""
    runs = [run["run"] for run in asked.runs]
    found = asked.ask(capsys, "diff", *runs)
    assert [row["run"] for row in found["rows"]] == runs
    assert [row["settings"] for row in found["rows"]] == [{"sft.seed": 42}, {"sft.seed": 1}, {"sft.seed": 42}]
    assert [row["cached"] for row in found["rows"]] == [0, 2, 5]
    for row, run in zip(found["rows"], asked.runs, strict=True):
        folder = artifact_folder(asked.store, run["stages"]["judge"]["outputs"]["evaluation"]["id"])
        result = json.loads((folder / "results.json").read_text())["accuracy"]
        assert row["metrics"]["judge.accuracy"] == {key: result[key] for key in ("value", "low", "high")}
        assert row["metrics"]["sft.loss"]["value"] == run["stages"]["sft"]["metrics"]["loss"]
    assert found["metrics"] == ["sft.loss", "more.loss"] and "judge.accuracy" in found["same"]
    heads, first, *_ = asked.show(capsys, "diff", *runs).splitlines()
    assert heads.split() == ["sft.seed", "sft.loss", "more.loss", "time", "cached", "run", "state"]
    assert first.split()[0] == "42" and first.endswith(f"0 of 5  {runs[0]}  ok")
    shown = asked.show(capsys, "diff", runs[0], status=2)
    assert shown == f"posttrain: {runs[0]} is one run, and there is no sweep of that name; give another run as well\n"


def test_a_stage_that_neither_run_came_to_is_not_said_to_be_the_same(capsys):
    from flows.compare import RunDifferences, StageResults
    from flows.inquiry_tables import diff_tables
    from flows.tables import show

    run = {"run": "r", "recipe": "small", "state": "ok", "started_at": "", "seconds": 1.0}
    states = {"judge": ("skipped", "skipped"), "sft": ("skipped", "cached"), "rows": ("cached", "ran")}
    stages = tuple(StageResults(name, pair, True, {}, {}, {}) for name, pair in states.items())
    show(*diff_tables(RunDifferences((run, run), (), (), stages)))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line and line[0] in states] == [
        ["judge", "skipped", "skipped", "not", "run"],
        ["sft", "skipped", "cached", "same"],
        ["rows", "cached", "ran", "same"],
    ]
