"""Which trials a sweep has, what they are called, and mistakes in them. Nothing runs here."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from artifacts.errors import RequestError
from flows.standings import Row, judged_by, ranked, row_of
from flows.sweep import Request, Sweep, plan_sweep, read_axes
from flows.trial import Ranking
from tests.flows.pipeline_stages import World


def sweep(world: World, *over: str, recipe: str | None = None, **options: Any) -> Sweep:
    return plan_sweep(Request(recipe or world.file(), over, **options), world.store)


def refusals(world: World, *over: str, **options: Any) -> list[tuple[str, str]]:
    with pytest.raises(RequestError) as refused:
        sweep(world, *over, **options)
    return [(problem.where, problem.what) for problem in refused.value.problems]


def test_every_value_with_every_other_the_last_setting_fastest(world: World) -> None:
    made = sweep(world, "one.text=a,b", "two.text=x,'y,z'", set=["three.text=t"])
    assert [(trial.number, trial.of, trial.label) for trial in made.trials] == [
        (1, 4, "one.text=a two.text=x"),
        (2, 4, "one.text=a two.text='y,z'"),
        (3, 4, "one.text=b two.text=x"),
        (4, 4, "one.text=b two.text='y,z'"),
    ]
    assert [dict(trial.values) for trial in made.trials[:2]] == [
        {"one.text": "a", "two.text": "x"},
        {"one.text": "a", "two.text": "y,z"},
    ]
    stages = [trial.plan.recipe.stages for trial in made.trials]
    assert [tuple(found[name].config.text for name in ("one", "two", "three")) for found in stages] == [
        ("a", "x", "t"), ("a", "y,z", "t"), ("b", "x", "t"), ("b", "y,z", "t"),
    ]  # fmt: skip
    recipe = f"{world.folder}/small.yaml"
    assert shlex.split(made.trials[1].to_json()["command"]) == [
        "posttrain", "run", recipe, "--set", "three.text=t", "--set", "one.text=a", "--set", "two.text='y,z'",
    ]  # fmt: skip


def test_values_are_read_as_set_reads_them() -> None:
    texts = "1e-5,0.00003", "[0.9, 0.99],[0.9,0.95]", "true,null,'1',1", "{path: a.jsonl}, code.py:right"
    axes = read_axes(Request("r", [f"s.f{index}={text}" for index, text in enumerate(texts)]))
    assert [axis.values for axis in axes] == [
        (("1e-5", 1e-5), ("0.00003", 3e-5)),
        (("[0.9, 0.99]", [0.9, 0.99]), ("[0.9,0.95]", [0.9, 0.95])),
        (("true", True), ("null", None), ("'1'", "1"), ("1", 1)),
        (("{path: a.jsonl}", {"path": "a.jsonl"}), ("code.py:right", "code.py:right")),
    ]


def test_the_same_request_is_the_same_sweep_and_another_one_another(world: World) -> None:
    name = sweep(world, "one.text=a,b").name
    assert name.startswith("small-") and len(name) == len("small-") + 6
    assert sweep(world, "one.text=a,  b", parallel=2, metric="two").name == name
    assert sweep(world, "one.text=a,c").name != name
    assert sweep(world, "one.text=a,b", set=["two.text=x"]).name != name
    assert sweep(world, "one.text=a,b", name="mine").name == "mine"


def test_what_is_no_list_of_values_is_refused(world: World) -> None:
    assert refusals(world, "one.text", "=a", "one.text=", "two.text=[a", name="a b") == [
        ("--name a b", "expected letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 61"),
        ("--over one.text", "expected NAME=VALUE,VALUE, for example dpo.beta=0.05,0.1"),
        ("--over =a", "expected NAME=VALUE,VALUE, for example dpo.beta=0.05,0.1"),
        ("--over one.text=", "no value is given; expected NAME=VALUE,VALUE"),
        (
            "--over two.text=[a",
            "not valid YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'",
        ),
    ]
    twice = "is given twice"
    assert refusals(world, "one.text=a,'a'") == [
        ("--over one.text=a,'a'", f"'a' {twice} (as a); each value makes one trial")
    ]
    assert refusals(world, "two.text=a,b", "two.text=c", "three.text=d", set=["three.text=x"]) == [
        ("--over two.text=c", "two.text is given by another --over as well; leave one of them out"),
        ("--over three.text=d", "three.text is given by another --set as well; leave one of them out"),
    ]
    assert refusals(world, "name=a,b") == [
        ("--over name=a,b", "name changes nothing of what a trial gives; give it with --set")
    ]


def test_mistakes_of_all_trials_are_said_at_once_with_their_values(world: World) -> None:
    """Each once, however many trials have it; of a parameter the line is the recipe's, so the value is named."""
    assert refusals(world, "one.text=a,5,6", "two.txet=x,y") == [
        ("--over two.txet=x: stages.two.with.txet", "unknown key; did you mean 'text'?"),
        ("--over two.txet=y: stages.two.with.txet", "unknown key; did you mean 'text'?"),
        ("--over one.text=5: stages.one.with.text", "expected text, found 5 (put it in quotes)"),
        ("--over one.text=6: stages.one.with.text", "expected text, found 6 (put it in quotes)"),
    ]
    stages = world.values()["stages"]
    stages["one"]["with"]["text"] = "${words}"
    recipe = world.file(parameters={"words": "1"}, stages=stages)
    assert refusals(world, "words=a,5", "two.text=x,y", recipe=recipe) == [
        (f"{recipe}:1: stages.one.with.text", "expected text, found 5 (put it in quotes) (with words=5)")
    ]
    stages["three"]["with"]["txet"] = "x"
    recipe = world.file(parameters={"words": "1"}, stages=stages)
    assert refusals(world, "words=a,b", recipe=recipe) == [
        (f"{recipe}:1: stages.three.with.txet", "unknown key; did you mean 'text'?")
    ]
    assert world.store.runs() == [] and world.ran() == []


def test_what_trials_are_judged_by(world: World) -> None:
    assert sweep(world, "one.text=a,b").trials[0].ranking == Ranking("beside")
    assert sweep(world, "one.text=a,b", until=["two"]).trials[0].ranking == Ranking("two")
    ranking = sweep(world, "one.text=a,b", metric="two.eval/loss", best="highest").trials[0].ranking
    assert ranking == Ranking("two", "eval/loss", "highest")
    expected = "expected STAGE.METRIC or STAGE, of the stages that run: one, two"
    assert refusals(world, "one.text=a,b", metric="tow.length", until=["two"]) == [
        ("--metric tow.length", f"no stage 'tow'; did you mean 'two'?; {expected}")
    ]


def payload(trial: int, state: str, **metrics: Any) -> dict[str, Any]:
    entry = {"uses": "make", "state": "ran", "metrics": metrics, "error": None}
    return {"run": f"r{trial}", "state": state, "stages": {"judge": entry}, "sweep": {"trial": trial}}


def test_the_best_is_first() -> None:
    """Of accuracy the highest, of a loss the lowest, unless it is said; without a number after, not well last."""
    runs = [
        payload(1, "failed", accuracy=0.9, loss=0.1),
        payload(2, "ok", accuracy=0.5, loss=2.0),
        payload(3, "ok"),
        payload(4, "ok", accuracy=0.7, loss=3.0),
        payload(5, "ok", accuracy=0.7, loss=1.0),
    ]

    def order(metric: str, best: str | None = None) -> list[int | None]:
        ranking = Ranking("judge", metric, best)
        name = judged_by(ranking, runs)
        rows: list[Row] = [row_of(run, {}, [] if name is None else [name]) for run in runs]
        return [row.trial for row in ranked(ranking, name, rows, ()).rows]

    assert order("accuracy") == [4, 5, 2, 3, 1]
    assert order("loss") == [5, 2, 4, 3, 1]
    assert order("loss", "highest") == [4, 2, 5, 3, 1]
    assert order("accuracy", "lowest") == [2, 4, 5, 3, 1]
