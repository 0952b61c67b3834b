"""What `posttrain deploy` looks for, beside what a plan says: what stages would meet when they begin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import RequestError, StoreError
from artifacts.local import LocalFiles
from flows.deploy_check import check
from tests.tiny_recipe import TASK, write_recipe

JUDGE = {"name": "judge", "parameters": {"model": "x", "template": "{prompt} {completion}"}}
SCORES = {"uses": "evaluate", "inputs": {"model": "base", "dataset": "rows"}}


def recipe(folder: Path, rewards: list[Any], **rows: Any) -> str:
    path = write_recipe(folder, {"scores": {**SCORES, "with": {"rewards": rewards}}})
    values = json.loads(path.read_text())
    values["stages"]["rows"]["with"] |= rows
    path.write_text(json.dumps(values, indent=1))
    return str(path)


def test_everything_that_would_end_a_run_at_night_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that cannot be loaded, rows that cannot be read: of all stages at once; what a plan finds, before that."""
    path = recipe(tmp_path, ["scores.py:right"], source={"path": "rows.jsonl"})
    (tmp_path / "scores.py").write_text("import nosuchpackage\ndef right(completions, **_): ...\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": 7}\n')
    with pytest.raises(RequestError) as refused:
        check(path, [], str(tmp_path / "store"))
    rows, code = refused.value.problems
    assert rows.where.endswith(": stages.rows.with.source") and "rows.jsonl row 1" in rows.what
    assert "'completion'" in rows.what
    assert code.where.endswith(": stages.scores.with.rewards[0]")
    assert "No module named 'nosuchpackage' (scores.py:1)" in code.what
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(RequestError, match="OPENAI_BASE_URL, which is not set"):
        check(recipe(tmp_path, [JUDGE]), [], str(tmp_path / "store"))
    path = recipe(tmp_path, ["scores.py:right"], source={"path": "rows.jsonl"})
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(RequestError, match=r"rows.jsonl$"):  # as a plan says it, before anything is loaded
        check(path, [], str(tmp_path / "store"))


def test_a_recipe_that_could_begin_is_planned_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 rows of a source the rest is not asked for; what is only said by a later row is met at night."""
    late = "\n\ndef late():\n    yield from rows()\n    raise ValueError\n"
    path = recipe(tmp_path, ["task.py:length"], source={"function": "task.py:late"})
    (tmp_path / "task.py").write_text(TASK.replace("range(12)", "range(10)") + late)
    made = check(path, [], str(tmp_path / "store"))
    assert {decision.state for decision in made.decisions.values()} == {"run"}
    assert [found for found in (tmp_path / "store").rglob("*") if found.is_file() and "check" in found.name] == []
    write = LocalFiles.write

    def full(self: LocalFiles, key: str, data: bytes) -> None:
        if "check" in key:
            raise StoreError("cannot write: No space left on device")
        write(self, key, data)

    monkeypatch.setattr(LocalFiles, "write", full)
    with pytest.raises(RequestError, match="nothing can be written: cannot write: No space left on device"):
        check(path, [], str(tmp_path / "store"))
