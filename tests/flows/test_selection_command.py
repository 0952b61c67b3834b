"""`--only`, `--from`, `--until` and `--force` on the command line: combinations, and what is said of wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows import cli

pytestmark = pytest.mark.usefixtures("fake_stages", "model_folder")

RECIPE = """\
name: chain
stages:
  data: {uses: prepare, with: {source: {path: rows.jsonl}}}
  sft: {uses: train, inputs: {model: ./model, dataset: data}}
  scores: {uses: score, inputs: {model: sft, dataset: data}}
  dpo: {uses: train, inputs: {model: sft, dataset: data, reference: scores}}
  beside: {uses: prepare, with: {source: {path: rows.jsonl}, split: 0.5}}
"""


@pytest.fixture
def command(tmp_path: Path, write_recipe, capsys):
    """Runs `posttrain plan` with selections; gives status, states (or nothing) and what was said."""
    recipe = str(write_recipe(RECIPE))

    def run(*selection: str) -> tuple[int, dict[str, str], str]:
        capsys.readouterr()
        status = cli.main(["plan", recipe, "--json", "--store", str(tmp_path / "store"), *selection])
        shown = capsys.readouterr()
        stages = json.loads(shown.out).get("stages", {})
        return status, {name: entry["state"] for name, entry in stages.items()}, shown.err

    return run


def states(selected: str) -> dict[str, str]:
    names = ("data", "sft", "scores", "dpo", "beside")
    return {name: "run" if name in selected.split() else "skipped" for name in names}


@pytest.mark.parametrize(
    ("selection", "selected"),
    [
        (("--until", "sft"), "data sft"),
        (("--until", "sft", "--until", "beside"), "data sft beside"),
        (("--from", "data"), "data sft scores dpo"),
        (("--from", "data", "--until", "scores"), "data sft scores"),
        (("--from", "data", "--from", "beside", "--until", "beside"), "beside"),
        (("--only", "data", "--only", "beside"), "data beside"),
        (("--only", "data", "--force", "data"), "data"),
        (("--force", "dpo"), "data sft scores dpo beside"),
    ],
)
def test_what_is_selected(command, selection, selected):
    assert command(*selection)[:2] == (0, states(selected))


THERE = "there are: data, sft, scores, dpo, beside"


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        (("--only", "stf"), f"posttrain: --only stf: the recipe has no such stage; did you mean 'sft'?; {THERE}"),
        (("--until", "nothing"), f"posttrain: --until nothing: the recipe has no such stage; {THERE}"),
        (
            ("--only", "sft", "--until", "dpo"),
            "posttrain: --only: cannot be combined with --from or --until; give one or the other",
        ),
        (("--from", "dpo", "--until", "sft"), f"posttrain: --from dpo --until sft: no stage is left to run; {THERE}"),
        (
            ("--until", "sft", "--force", "beside"),
            "posttrain: --force beside: not among the stages of --until sft --force beside",
        ),
        (
            ("--from", "scores", "--until", "scores"),
            "posttrain: 2 mistakes, nothing was started\n"
            "  --from scores --until scores: scores reads from sft, which is not selected and whose result is not in "
            "the store (first run); run with --until sft first, or without --from\n"
            "  --from scores --until scores: scores reads from data, which is not selected and whose result is not in "
            "the store (first run); run with --until data first, or without --from",
        ),
        (
            ("--only", "a", "--force", "b"),
            "posttrain: 2 mistakes, nothing was started\n"
            f"  --only a: the recipe has no such stage; {THERE}\n  --force b: the recipe has no such stage; {THERE}",
        ),
    ],
)
def test_what_is_wrong_is_said(command, selection, said):
    assert command(*selection) == (2, {}, f"{said}\n")
