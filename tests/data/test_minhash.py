"""Near duplicates and common runs of words against looking at every pair, on small corpora drawn by seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.minhash import LARGEST_MISS, NUMBERS, numbers_per_band, similar_pairs
from stages.data.overlap import overlaps
from stages.data.shingles import Texts, words_of


def corpus(seed: int, count: int) -> list[str]:
    """Texts of a few words, many of them made of an earlier one with some words replaced, moved or left out."""
    draws = np.random.default_rng(seed)
    texts: list[list[str]] = []
    for _ in range(count):
        if texts and draws.random() < 0.6:
            words = list(texts[draws.integers(len(texts))])
            for _ in range(draws.integers(0, 4)):
                place = int(draws.integers(len(words)))
                words[place : place + int(draws.integers(0, 2))] = [f"w{draws.integers(40)}"]
        else:
            words = [f"w{draws.integers(40)}" for _ in range(int(draws.integers(1, 40)))]
        texts.append(words)
    return [" ".join(words) for words in texts]


def word_runs(text: str, size: int) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)} or {tuple(words)}


def all_pairs(left: list[str], right: list[str], size: int, similarity: float) -> list[tuple[int, int, float]]:
    """By looking at each with each, on sets of words."""
    found = []
    for one, first in enumerate(left):
        for other, second in enumerate(right):
            ours, theirs = word_runs(first, size), word_runs(second, size)
            value = len(ours & theirs) / len(ours | theirs)
            if value >= similarity:
                found.append((one, other, value))
    return found


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_the_pairs_of_a_search_over_all(size: int, similarity: float) -> None:
    left, right = corpus(1, 120), corpus(2, 60) + corpus(1, 80)[40:]
    sets = [Texts.of(texts).shingles(size) for texts in (left, right)]
    expected = all_pairs(left, right, size, similarity)
    assert len(expected) > 40
    for seed in (0, 1):
        assert similar_pairs(*sets, similarity, seed) == expected
    inside = [pair for pair in all_pairs(left, left, size, similarity) if pair[0] < pair[1]]
    assert similar_pairs(sets[0], None, similarity, 0) == inside


@given(st.floats(0.3, 1.0))
def test_bands_miss_next_to_nothing_and_are_as_wide_as_they_can_be(similarity: float) -> None:
    width = numbers_per_band(similarity)
    miss = [(1 - similarity**r) ** (NUMBERS // r) for r in (width, 2 * width)]
    assert miss[0] <= LARGEST_MISS and (width == 32 or miss[1] > LARGEST_MISS)


def common_runs(text: str, others: list[str], size: int) -> tuple[list[int], set[int]]:
    """(places of runs that stand in another text, those texts)."""
    words = words_of(text)
    places, texts = [], set()
    for place in range(len(words) - size + 1):
        run = tuple(words[place : place + size])
        holding = {
            index
            for index, other in enumerate(others)
            if len(words_of(other)) >= size and run in word_runs(other, size)
        }
        if holding:
            places.append(place)
            texts |= holding
    return places, texts


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("min_share", [0.0, 0.5])
def test_common_runs_of_a_search_over_all(size: int, min_share: float) -> None:
    theirs, ours = corpus(3, 50) + corpus(4, 30)[:10], corpus(4, 80)
    found = overlaps(Texts.of(theirs), Texts.of(ours), size, min_share)
    expected: dict[int, Any] = {}
    guilty: set[int] = set()
    for row, text in enumerate(theirs):
        places, texts = common_runs(text, ours, size)
        share = len(places) / max(1, len(words_of(text)) - size + 1)
        if places and share >= min_share:
            expected[row] = share
            guilty |= texts
    assert {one.row: one.share for one in found.rows} == pytest.approx(expected)
    assert found.train_rows == sorted(guilty) and len(expected) > 5
    for one in found.rows:  # what is shown does stand in both
        words = words_of(theirs[one.row])[one.start : one.stop]
        assert len(words) >= size and " ".join(words) in " ".join(words_of(ours[one.train_row]))


def test_by_hand() -> None:
    """abcd and abce share ab, bc of ab, bc, cd, ce: 2 of 4. A text shorter than a run is one run of its own."""
    sets = Texts.of(["A b, c D!", "a b c e", "a", "", "A?"]).shingles(2)
    assert [len(own) for own in sets] == [3, 3, 1, 0, 1]
    assert similar_pairs(sets[:1], sets[1:2], 0.5, 0) == [(0, 0, 0.5)]
    assert similar_pairs(sets[:1], sets[1:2], 0.51, 0) == []
    assert similar_pairs(sets[2:3], sets[4:], 1.0, 0) == [(0, 0, 1.0)]
    found = overlaps(Texts.of(["x the cat sat y"]), Texts.of(["dog", "The cat -- sat."]), 3, 0.0).rows
    assert [(one.row, one.train_row, one.start, one.stop) for one in found] == [(0, 1, 1, 4)]
    assert found[0].share == pytest.approx(1 / 3)


def test_words_are_compared_whatever_their_form() -> None:
    assert words_of("Straße, Ünïon—ﬁnd ２!") == ["strasse", "ünïon", "find", "2"]


def test_work_grows_with_the_texts_not_with_their_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,000 texts that are all different: 8,000,000 pairs, of which next to none is looked at."""
    from stages.data import minhash

    looked: list[int] = []
    exact = minhash.jaccard

    def counted(one: Any, other: Any) -> float:
        looked.append(1)
        return exact(one, other)

    monkeypatch.setattr(minhash, "jaccard", counted)
    draws = np.random.default_rng(0).integers(0, 5_000, (4_000, 30))
    texts = [" ".join(f"w{word}" for word in row) for row in draws]
    assert similar_pairs(Texts.of([*texts, texts[7]]).shingles(5), None, 0.8, 0) == [(7, 4_000, 1.0)]
    assert len(looked) < 100
