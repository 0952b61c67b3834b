"""How often garbage is looked for."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from stages import garbage


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = gc.get_threshold()
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(1))  # these tests' own objects may go
    frozen.clear()
    yield
    gc.set_threshold(*before)


frozen: list[int] = []


def test_seldom_and_then_as_usual() -> None:
    usual = gc.get_threshold()
    garbage.look_seldom()
    assert gc.get_threshold() == (100_000, *usual[1:]) and gc.isenabled()
    garbage.look_as_usual()
    assert gc.get_threshold() == usual and frozen == [1]


def test_a_process_that_is_not_a_stages_stays_as_it_is() -> None:
    """One that only calls what stages do: what it holds now may become garbage."""
    usual = gc.get_threshold()
    garbage.look_as_usual()
    assert gc.get_threshold() == usual and frozen == []
