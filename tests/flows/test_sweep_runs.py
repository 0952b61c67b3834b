"""Sweeps as Prefect flows, on a real server: what is shared, killed, failed and shown, and what stays as it was."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from artifacts import Artifact
from flows import cli
from flows.pipeline import run_pipeline
from tests.flows.pipeline_stages import World
from tests.flows.prefect_server import Api, ended
from tests.waiting import LEFT_SECONDS, LIMIT_SECONDS, until

HERE = Path(__file__).parent


def sweep(world: World, capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    """The JSON of the command."""
    capsys.readouterr()
    assert cli.main(["sweep", world.file(), *arguments, "--json", "--store", world.store.url]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def by_trial(found: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(found["rows"], key=lambda row: int(row["trial"]))


def text_of(world: World, run: dict[str, Any], stage: str) -> str:
    (output,) = run["stages"][stage]["outputs"].values()
    folder = world.store.materialize(Artifact(output["kind"], output["id"].removeprefix("sha256:")))
    return (folder / "text").read_text()


GRID = ("--over", "two.text=x,xx", "--over", "three.text=y,yy", "--metric", "three.length")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["1", "3"])
def test_what_trials_share_runs_once(world: World, api: Api, capsys, parallel: str) -> None:
    """2 x 2 trials of one -> two -> three, and beside: 1, 2, 4 and 1 processes."""
    run_pipeline(world.plan())
    assert sorted(world.ran()) == ["beside", "one", "three", "two"]
    aliases = world.store.aliases()

    found = sweep(world, capsys, *GRID, "--parallel", parallel, "--set", "one.text=l")
    assert Counter(world.ran()) == {"one": 1, "two": 2, "three": 4}  # beside is the earlier run's
    assert world.store.aliases() == aliases
    assert (found["state"], found["best"], found["metrics"]) == ("ok", "highest", ["three.length"])
    # 1 + two + three characters, longest first, equal ones in the order of the trials
    assert [(row["trial"], row["settings"], row["metrics"]["three.length"]["value"]) for row in found["rows"]] == [
        (4, {"two.text": "xx", "three.text": "yy"}, 5),
        (2, {"two.text": "x", "three.text": "yy"}, 4),
        (3, {"two.text": "xx", "three.text": "y"}, 4),
        (1, {"two.text": "x", "three.text": "y"}, 3),
    ]
    for row in found["rows"]:
        run = world.store.read_run(row["run"])
        assert text_of(world, run, "three") == f"l{row['settings']['two.text']}{row['settings']['three.text']}"
        assert len(text_of(world, run, "three")) == row["metrics"]["three.length"]["value"]
        states = Counter(entry["state"] for entry in run["stages"].values())
        assert (row["cached"], row["stages"], row["error"]) == (states["cached"], 4, None)
    assert sum(row["cached"] for row in found["rows"]) == 4 * 4 - 7

    again = sweep(world, capsys, *GRID, "--set", "one.text=l")
    assert again["sweep"] == found["sweep"] and world.ran() == []
    assert {row["cached"] for row in again["rows"]} == {4}
    assert [row["settings"] for row in again["rows"]] == [row["settings"] for row in found["rows"]]


def test_a_trial_in_prefect(world: World, api: Api, capsys) -> None:
    found = sweep(world, capsys, "--over", "two.text=x,y", "--name", "letters", "--only", "one", "--only", "two")
    first, second = by_trial(found)
    shown = api.flow_run(first["run"])
    assert shown.name == f"small two.text=x {first['run'][-6:]}"
    assert "-letters-" in first["run"] and shown.tags == ["letters"] and shown.state.name == "Completed"
    assert api.flow_run(second["run"]).tags == ["letters"]
    states = api.task_states(second["run"], 2)
    assert {name: state.name for name, state in states.items()} == {"one": "Cached", "two": "Completed"}


def test_a_trial_that_fails_stops_no_other(world: World, api: Api, capsys) -> None:
    arguments = ("--over", "two.text=x,bad,xxxx", "--set", "two.refuses=bad", "--metric", "three")
    found = sweep(world, capsys, *arguments, status=1)
    assert Counter(world.ran()) == {"one": 1, "beside": 1, "two": 3, "three": 2}
    assert [(row["trial"], row["state"], row["error"]) for row in found["rows"]] == [
        (3, "ok", None),
        (1, "ok", None),
        (2, "failed", "two: the text bad is refused"),
    ]
    assert found["state"] == "failed"
    assert Path(found["report"]).is_relative_to(world.store.scratch / found["rows"][0]["run"])
    page = Path(found["report"]).read_text()
    assert re.findall(r'<tr(?: class="best")? data-trial="(.)"', page) == ["3", "1", "2"]
    assert "two: the text bad is refused" in page
    assert cli.main(["sweep", world.file(), *arguments, "--store", world.store.url]) == 1
    shown = capsys.readouterr()
    assert [line.split()[:4] for line in shown.out.splitlines()[2:]] == [
        ["3", "xxxx", "6", shown.out.splitlines()[2].split()[3]],
        ["1", "x", "3", shown.out.splitlines()[3].split()[3]],
        ["2", "bad", "–", shown.out.splitlines()[4].split()[3]],
    ]
    assert shown.out.splitlines()[4].endswith("failed: two: the text bad is refused")
    assert f"posttrain run {world.folder}/small.yaml --set two.refuses=bad " in shown.err
    assert "--set two.text=xxxx" in shown.err


def test_a_shared_stage_that_fails_is_not_run_by_every_trial(world: World, api: Api, capsys) -> None:
    """Two wait for the third's lease. `fail` is operational, no part of the fingerprint: with another one the stage may
    end differently."""
    arguments = ("--over", "two.text=x,xx,xxx", "--metric", "three", "--parallel", "3")
    found = sweep(world, capsys, *arguments, "--set", "one.fail=rows 3 is empty", status=1)
    assert Counter(world.ran()) == {"one": 1, "beside": 1}
    said = [row["error"] for row in by_trial(found)]
    (first,) = [trial for trial, error in enumerate(said, start=1) if error == "one: rows 3 is empty"]
    again = f"one: rows 3 is empty (in trial {first}; not run again)"
    assert sorted(said) == ["one: rows 3 is empty", again, again]
    assert [row["state"] for row in found["rows"]] == ["failed"] * 3
    sweep(world, capsys, "--over", "one.fail=a,b,''", "--until", "one", status=1)
    assert world.ran() == ["one"] * 3


def test_what_is_not_asked_for_is_not_told(world: World, api: Api, capsys) -> None:
    """Only of stages that a failure leaves out."""
    arguments = ["--over", "one.text=a,bad", "--set", "one.refuses=bad", "--until", "two", "--store", world.store.url]
    assert cli.main(["sweep", world.file(), *arguments]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert said == ["2/2 two: skipped: one failed"]


def test_the_command_that_is_printed_names_the_best(world: World, api: Api, capsys) -> None:
    found = sweep(world, capsys, "--over", "two.text=x,xx", "--metric", "three")
    world.ran()
    program, *arguments = shlex.split(found["rows"][0]["command"])
    assert program == "posttrain" and "@small/three" not in world.store.aliases()
    assert cli.main([*arguments, "--json"]) == 0
    assert world.ran() == []
    assert text_of(world, json.loads(capsys.readouterr().out), "three") == "1xx3"
    folder = world.store.materialize(world.store.find("@small/three"))
    assert (folder / "text").read_text() == "1xx3"


def test_mistakes_are_found_before_anything_starts(world: World, api: Api, capsys) -> None:
    arguments = ["sweep", world.file(), "--over", "one.text=a,b,7", "--json", "--store", world.store.url]
    assert cli.main(arguments) == 2
    assert json.loads(capsys.readouterr().out)["problems"] == [
        {"where": "--over one.text=7: stages.one.with.text", "what": "expected text, found 7 (put it in quotes)"}
    ]
    assert world.ran() == [] and world.store.runs() == []


@pytest.mark.parametrize(
    ("number", "status", "state", "parallel"),
    [
        (signal.SIGKILL, -9, "killed", "1"),
        (signal.SIGTERM, 143, "interrupted", "2"),
        (signal.SIGINT, 130, "interrupted", "1"),
    ],
)
def test_a_sweep_that_is_ended_goes_on_when_it_runs_again(
    world: World, api: Api, capsys, number: int, status: int, state: str, parallel: str
) -> None:
    """The first trial is done, the second waits in its stage two for a file that is not there yet."""
    arguments = [
        "--over", "two.text=x,xx,xxx", "--set", f"two.until={world.folder}/gate-{{text}}", "--metric", "three",
    ]  # fmt: skip
    (world.folder / "gate-x").touch()
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "PREFECT_API_URL": api.url}
    command = [sys.executable, str(HERE / "sweep_process.py"), "sweep", world.file(), *arguments]
    process = subprocess.Popen(
        [*command, "--parallel", parallel, "--store", world.store.url],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    waiting = int(parallel)  # trials that wait by then
    try:
        log = world.folder / "log"
        until(lambda: log.exists() and Counter(log.read_text().split())["two"] == 1 + waiting)
        until(lambda: "ok" in {world.store.read_run(run)["state"] for run in world.store.runs()})
        left = psutil.Process(process.pid).children(recursive=True)
        assert len(left) >= 2 * waiting  # supervisors and stages
        process.send_signal(number)
        until(lambda: all(map(ended, left)), LEFT_SECONDS)
        _, said = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == status, said
    assert Counter(world.ran()) == {"one": 1, "beside": 1, "two": 1 + waiting, "three": 1}
    runs = [world.store.read_run(run) for run in world.store.runs()]
    assert Counter(run["state"] for run in runs) == {"ok": 1, state: waiting}
    (world.folder / "gate-xx").touch()
    (world.folder / "gate-xxx").touch()
    found = sweep(world, capsys, *arguments)
    assert Counter(world.ran()) == {"two": 2, "three": 2}
    assert [(row["trial"], row["cached"]) for row in by_trial(found)] == [(1, 4), (2, 2), (3, 2)]
    assert found["state"] == "ok" and {run["sweep"]["name"] for run in runs} == {found["sweep"]}
    runs = [world.store.read_run(run) for run in world.store.runs()]
    assert len(runs) == 3 + 1 + waiting  # the second start began all three
    for row in found["rows"]:
        mine = [run["seconds"] for run in runs if run["sweep"]["settings"] == row["settings"]]
        assert row["seconds"] == pytest.approx(sum(mine)) and len(mine) == (1 if row["trial"] > 1 + waiting else 2)
    assert cli.main(["diff", found["sweep"], "--json", "--store", world.store.url]) == 0
    shown = {row["trial"]: row["seconds"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert shown == {row["trial"]: row["seconds"] for row in found["rows"]}


def test_diff_of_a_sweep_by_its_name(world: World, api: Api, capsys) -> None:
    """A parameter that goes to two stages is one column, as it was swept; a trial that failed is in the table."""
    stages = world.values()["stages"]
    stages["two"]["with"]["text"] = stages["three"]["with"]["text"] = "${words}"
    recipe = world.file(parameters={"words": "1"}, stages=stages)
    arguments = ["--over", "words=x,bad,xxx", "--set", "two.refuses=bad", "--metric", "three", "--name", "words"]
    assert cli.main(["sweep", recipe, *arguments, "--json", "--store", world.store.url]) == 1
    swept = json.loads(capsys.readouterr().out)

    def ask(*references: str) -> dict[str, Any]:
        assert cli.main(["diff", *references, "--json", "--store", world.store.url]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    found = ask("words")
    assert (found["settings"], found["metrics"], found["best"]) == (
        ["words"],
        ["three.length", "two.length"],
        "highest",
    )
    assert found["same"] == ["one.length", "beside.length"]
    assert [row["trial"] for row in found["rows"]] == [3, 1, 2]
    assert [(row["run"], row["settings"], row["state"]) for row in found["rows"]] == [
        (row["run"], row["settings"], row["state"]) for row in swept["rows"]
    ]
    best, middle, failed = found["rows"]
    assert {name: value["value"] for name, value in best["metrics"].items()} == {
        "one.length": 1, "two.length": 4, "three.length": 7, "beside.length": 1,
    }  # fmt: skip
    assert set(failed["metrics"]) == {"one.length", "beside.length"}
    # the same runs one by one: in the order given, with the places that the parameter fills
    found = ask(middle["run"], failed["run"], best["run"])
    assert found["settings"] == ["two.text", "three.text"] and found["best"] is None
    assert [row["settings"] for row in found["rows"]] == [
        {"two.text": text, "three.text": text} for text in ("x", "bad", "xxx")
    ]
    assert set(ask(middle["run"], best["run"])) == {"runs", "causes", "surroundings", "stages"}
