"""Imports of stages and user's code where CPython's `ast` mixes threads up, which luck decides: here it is played."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import RequestError
from stages.ast_race import MISMATCH, TRIES
from stages.stage import load_stage
from stages.user_code.sources import parsed


def fails_first(function: Any, times: int, message: str) -> Any:
    left = iter([message] * times)

    def called(*arguments: Any, **named: Any) -> Any:
        if (text := next(left, None)) is not None:
            raise SystemError(text)
        return function(*arguments, **named)

    return called


def test_a_stage_whose_import_met_another_thread_is_imported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CPython words it; of any other error, and of one that does not pass, nothing is hidden."""
    said = f"{MISMATCH} (before=66, after=63)"
    imported = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", fails_first(imported, TRIES - 1, said))
    assert load_stage("normalize").name == "normalize"
    monkeypatch.setattr(importlib, "import_module", fails_first(imported, TRIES, said))
    with pytest.raises(SystemError, match="recursion depth mismatch"):
        load_stage("normalize")
    monkeypatch.setattr(importlib, "import_module", fails_first(imported, 1, "something else"))
    with pytest.raises(SystemError, match="something else"):
        load_stage("normalize")


def test_code_whose_reading_met_another_thread_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "code.py"
    file.write_text("x = 1\n")
    monkeypatch.setattr(ast, "parse", fails_first(ast.parse, 1, MISMATCH))
    assert len(parsed(file).body) == 1
    file.write_text("x = \n")
    with pytest.raises(RequestError, match=r"code.py:1: not valid Python"):
        parsed(file)
