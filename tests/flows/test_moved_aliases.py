"""What `--set` says of a run afterwards: in Prefect's pages, and of the aliases that it took."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from flows.moved_aliases import in_words
from flows.pipeline import run_pipeline
from flows.terminal import Terminal
from tests.flows.pipeline_stages import World
from tests.flows.prefect_server import Api


def test_the_pages_show_settings_and_no_secret(world: World, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "k3yk3yk3yk3yk3yk3y")
    payload = run_pipeline(world.plan("two.text=h", "parallel=1", "two.text=i", "one.fail=k3yk3yk3yk3yk3yk3y"))
    shown = api.flow_run(payload["run"]).parameters
    assert shown["set"] == ["parallel=1", "two.text=i", "one.fail=***"]  # of two for one place, the one that holds
    assert (shown["recipe"], shown["store"]) == ("small", world.store.url)
    assert "k3yk3y" not in str(shown)


def test_aliases_that_settings_took_are_said_once(world: World, api: Api) -> None:
    def run(*settings: str) -> tuple[dict[str, Any], list[str]]:
        text = io.StringIO()
        with Terminal(console=Console(file=text, width=200)) as terminal:
            payload = run_pipeline(world.plan(*settings), terminal)
        return payload, [line for line in text.getvalue().splitlines() if "name=trial" in line]

    assert run("two.text=g")[1] == []  # there was nothing to take
    assert run()[1] == []  # the recipe as it is takes its names back
    payload, said = run("two.text=h")
    assert payload["moved"] == {"aliases": ["small/two", "small/three"], "settings": ["two.text=h"]}
    assert said == ["@small/two and @small/three are now of --set two.text=h; --set name=trial keeps them apart"]
    assert run("two.text=h")[1] == []  # they are of it already
    run()
    assert run("two.text=h", "name=trial")[1] == []
    assert run("parallel=1")[1] == []  # which is no setting of a result
    payload, said = run("three.text=i", "two.fail=x")
    assert payload["state"] == "ok" and len(said) == 1  # two is cached
    payload, said = run("one.text=e", "three.fail=x")  # of a run that failed on its way too
    assert payload["state"] == "failed"
    assert said == [
        "@small/one and @small/two are now of --set one.text=e --set three.fail=x; --set name=trial keeps them apart"
    ]


def test_many_aliases_are_one_line() -> None:
    names = [f"mine/{name}" for name in "abcde"]
    assert in_words({"moved": {"aliases": names, "settings": ["x=1"]}}) == (
        "@mine/a, @mine/b, @mine/c and 2 more are now of --set x=1; --set name=trial keeps them apart"
    )
    assert in_words({"moved": {"aliases": names[:1], "settings": ["x=1"]}}) == (
        "@mine/a is now of --set x=1; --set name=trial keeps it apart"
    )
    assert in_words({}) is None
