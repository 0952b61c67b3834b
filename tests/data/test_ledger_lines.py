"""What the log says of a ledger."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.context import local_context
from stages.data.ledger import say_dropped
from tests.stages.normalized import write_jsonl


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ({"used": 3}, []),
        ({"used": 3, "truncated": 2}, ["5 rows: 3 used, 2 truncated"]),
        ({"used": 3, "truncated": 2, "masked": 1}, ["6 rows: 3 used, 2 truncated; 1 dropped: masked"]),
        ({"masked": 1, "duplicate": 2}, ["3 rows: none left; 3 dropped: 2 duplicate, 1 masked"]),
    ],
)
def test_what_was_cut_is_said_as_what_was_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: dict[str, int], said: list[str]
) -> None:
    source = {"source": {"path": write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])}}
    context = local_context("normalize", source, folder=tmp_path)
    told: list[str] = []
    monkeypatch.setattr(type(context), "log", lambda self, text: told.append(text))
    say_dropped(context, states)
    assert told == said
