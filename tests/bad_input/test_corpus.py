"""Every wrong recipe and every broken dataset under tests/bad_input is refused in the words of its `expected.txt`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_input import corpus


def test_there_is_one_message_for_every_file() -> None:
    assert list(corpus.expected(corpus.RECIPES)) == corpus.recipes()
    assert list(corpus.expected(corpus.DATASETS)) == corpus.datasets()
    assert len(corpus.recipes()) >= 60
    assert len(corpus.datasets()) >= 40


@pytest.mark.parametrize("name", corpus.recipes())
def test_a_wrong_recipe(name: str, tmp_path: Path) -> None:
    assert corpus.said_of_recipe(name, tmp_path) == corpus.expected(corpus.RECIPES)[name]
    assert not any((tmp_path / "artifacts").glob("*")), "something was made"


@pytest.mark.parametrize("name", corpus.datasets())
def test_a_broken_dataset(name: str, tmp_path: Path) -> None:
    assert corpus.said_of_dataset(name, tmp_path) == corpus.expected(corpus.DATASETS)[name]
    assert not list(tmp_path.glob("job/out/*/dataset.json")), "something was made"
    assert not list(tmp_path.glob("job/scratch-0/*")), "something was left"
