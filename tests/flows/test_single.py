"""Stages that one process does: several would write the same folder at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from artifacts.errors import RequestError, StageError
from flows.recipe import Recipe
from stages.__main__ import run_spec
from stages.context import local_context
from stages.stage import STAGES, load_stage

SINGLE = [
    "average",
    "contamination",
    "gate",
    "init_model",
    "merge_adapter",
    "mixture",
    "normalize",
    "push_to_hub",
    "rescore",
    "set_chat_template",
]
"""Those that never ask how many processes there are."""


def test_a_second_process_of_a_stage_that_one_does_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(name for name in STAGES if load_stage(name).single) == SINGLE
    config = {"source": {"path": str(tmp_path / "rows.jsonl")}, "type": "language_modeling"}
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    context = local_context("normalize", config, folder=tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(StageError, match=r"normalize .* runs in one process, but the launcher made 2; start one"):
            run_spec(replace(context.spec, processes=2))
    assert not (Path(context.spec.job) / "out").exists()


def test_processes_for_every_stage_are_for_those_that_can_use_them(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    rows = {"uses": "normalize", "with": {"source": {"path": "rows.jsonl"}, "type": "language_modeling"}}
    base = {"uses": "init_model", "inputs": {"dataset": "rows"}}
    train = {"uses": "sft", "inputs": {"model": "base", "dataset": "rows"}}
    values = {
        "launch": {"processes": 2, "config": "zero2", "threads": 1},
        "stages": {"rows": rows, "base": base, "train": train},
    }
    launches = {name: stage.launch for name, stage in Recipe.from_dict(values, base=tmp_path).stages.items()}
    assert {name: (launch.processes, launch.config, launch.threads) for name, launch in launches.items()} == {
        "rows": (1, None, 1),
        "base": (1, None, 1),
        "train": (2, "zero2", 1),
    }
    values["stages"] = {"rows": rows, "base": {**base, "launch": {"processes": 2}}, "train": train}
    with pytest.raises(RequestError, match=r"stages\.base\.launch\.processes: init_model runs in one process; leave"):
        Recipe.from_dict(values, base=tmp_path)
