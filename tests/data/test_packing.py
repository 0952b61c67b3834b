"""Packs against packs made by hand, a plain quadratic search, and what must hold for any lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.packing import best_fit_decreasing, fill, split, wrap
from stages.data.tokenize import TokenizedSequence


@pytest.mark.parametrize(
    ("lengths", "packs"),
    [
        # the longest, then 3 and the 1 that fills it, then 2
        ([4, 2, 3, 1], [[0], [2, 3], [1]]),
        # 3; two of the 2s; the last 2; a 1 beside the 3, which leaves no room, and a 1 beside the last 2
        ([2, 2, 2, 1, 1, 3], [[5, 3], [0, 1], [2, 4]]),
        ([4, 4], [[0], [1]]),
        ([], []),
    ],
)
def test_by_hand(lengths: list[int], packs: list[list[int]]) -> None:
    assert best_fit_decreasing(lengths, 4) == packs


def plain_search(lengths: list[int], capacity: int) -> list[int]:
    """Tokens of every pack, each row put where least room is left, by looking at all packs."""
    packs: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [pack for pack, used in enumerate(packs) if used + length <= capacity]
        if fitting:
            packs[max(fitting, key=lambda pack: packs[pack])] += length
        else:
            packs.append(length)
    return sorted(packs)


@given(st.lists(st.integers(1, 16), max_size=60))
@settings(max_examples=200, deadline=None)
def test_every_row_once_as_full_as_by_looking_at_all(lengths: list[int]) -> None:
    packs = best_fit_decreasing(lengths, 16)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert sorted(sum(lengths[index] for index in pack) for pack in packs) == plain_search(lengths, 16)


def test_realistic_lengths_fill_the_packs() -> None:
    """Log-normal lengths around 250 tokens, cut at 1,024, as instruction data has them."""
    draws = np.random.default_rng(0).lognormal(5.2, 0.8, 20_000)
    lengths = np.clip(draws, 5, 1024).astype(int).tolist()
    packs = best_fit_decreasing(lengths, 1024)
    assert fill(lengths, len(packs), 1024) > 0.99


def test_a_row_that_fits_no_pack() -> None:
    with pytest.raises(ValueError, match="row 1 has 5 tokens, a pack holds 4"):
        best_fit_decreasing([4, 5], 4)


def row(row_id: str, token_ids: list[int], untrained: int = 1) -> TokenizedSequence:
    mask = [position >= untrained for position in range(len(token_ids))]
    return TokenizedSequence(row_id, token_ids, mask)


def test_splitting_keeps_every_token_once() -> None:
    rows = [row("a", [1, 2, 3, 4, 5]), row("b", [6, 7]), row("c", [1, 2, 3, 4, 5, 6, 7, 8, 9], untrained=5)]
    pieces = split(rows, 4)
    assert [(piece.row_id, piece.token_ids) for piece in pieces] == [
        ("a#1", [1, 2, 3, 4]),
        ("b", [6, 7]),
        ("c#2", [5, 6, 7, 8]),  # c#1 has nothing to train, nor have a#2 and c#3, whose only tokens are not predicted
    ]
    assert pieces[0].loss_mask == [False, True, True, True] and pieces[2].loss_mask == [False, True, True, True]


def test_wrapping_cuts_the_stream() -> None:
    rows = [row("a", [1, 2, 3, 4, 5]), row("b", [6, 7]), row("c", [8, 9, 10]), row("d", [11])]
    pieces = wrap(rows, 4)
    assert [piece.token_ids for piece in pieces] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]
    # a row's first token is still not trained, nor is a piece's
    assert [piece.loss_mask for piece in pieces] == [
        [False, True, True, True],
        [False, False, True, False],
        [False, True, False],
    ]
