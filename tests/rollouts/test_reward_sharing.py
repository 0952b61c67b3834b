"""Several processes and one judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from artifacts.errors import StageError
from stages.training import generation
from stages.training.generation import by_the_first


@dataclass
class Process:
    """What `by_the_first` sees of an accelerator."""

    rank: int

    num_processes = 2

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    """everywhere(compute) -> what by_the_first gives in the first process, and then in the second."""
    sent: list[list[Any]] = []

    def broadcast(objects: list[Any]) -> list[Any]:
        sent.append(objects)
        return sent[0]

    monkeypatch.setattr(generation, "broadcast_object_list", broadcast)
    return lambda compute: [lambda rank=rank: by_the_first(Process(rank), compute) for rank in range(2)]


def test_functions_are_called_by_the_first_process_only(everywhere: Any) -> None:
    called = []
    first, second = everywhere(lambda: called.append(1) or {"judge": [1.0, None]})
    assert first() == second() == {"judge": [1.0, None]}
    assert called == [1]


def test_an_error_reaches_all_of_them(everywhere: Any) -> None:
    def compute() -> Any:
        raise StageError("row r1, completion 0 is wrong")

    for process in everywhere(compute):
        with pytest.raises(StageError, match="row r1, completion 0 is wrong"):
            process()
