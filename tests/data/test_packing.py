"""Packs against packs made by hand, a plain quadratic search, and what must hold for any lengths."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.ledger import RowLedger
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
@settings(max_examples=200)
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


def counted_lines(function: Any, *arguments: Any) -> int:
    """Lines that a call of a function runs, those of what it calls not among them."""
    lines = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code is not function.__code__:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("smallest", [1, 600])
def test_work_grows_with_the_rows_not_with_the_packs(smallest: int) -> None:
    """At most 16 lines a row: a million rows are 16 million lines, whether packs hold many rows or one each."""
    lengths = np.random.default_rng(0).integers(smallest, 1025, 12_000).tolist()
    some, all_ = (counted_lines(best_fit_decreasing, part, 1024) for part in (lengths[:3_000], lengths))
    assert some <= 16 * 3_000 and all_ <= 16 * 12_000
    assert all_ == pytest.approx(4 * some, rel=0.05)


def test_packs_follow_from_lengths_alone() -> None:
    """Rows of equal length may change places; what the packs hold of each length does not."""
    lengths = np.random.default_rng(1).integers(1, 257, 2_000)
    packs = [sorted(lengths[index] for index in pack) for pack in best_fit_decreasing(lengths.tolist(), 256)]
    order = np.random.default_rng(2).permutation(len(lengths))
    moved = lengths[order]
    again = [sorted(moved[index] for index in pack) for pack in best_fit_decreasing(moved.tolist(), 256)]
    assert sorted(again) == sorted(packs)


def row(row_id: str, token_ids: list[int], untrained: int = 1) -> TokenizedSequence:
    mask = [position >= untrained for position in range(len(token_ids))]
    return TokenizedSequence(row_id, token_ids, mask)


def test_splitting_keeps_every_token_once() -> None:
    rows = [row("a", [1, 2, 3, 4, 5]), row("b", [6, 7]), row("c", [1, 2, 3, 4, 5, 6, 7, 8, 9], untrained=5)]
    ledger = ledger_of(rows)
    pieces = split(rows, 4, ledger)
    assert [(piece.row_id, piece.token_ids) for piece in pieces] == [
        ("a#1", [1, 2, 3, 4]),
        ("b", [6, 7]),
        ("c#2", [5, 6, 7, 8]),  # c#1 has nothing to train, nor have a#2 and c#3, whose only tokens are not predicted
    ]
    assert pieces[0].loss_mask == [False, True, True, True] and pieces[2].loss_mask == [False, True, True, True]

    # of 16 tokens the 1 of a#2, the 4 of c#1 and the 1 of c#3 are in no piece
    assert ledger.to_json()["tokens"] == {"rows": 3, "input": 16, "states": {"masked": 6, "used": 10}}
    assert ledger.changes == {"parts of rows without a trained token": 3}


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12), st.integers(2, 12))
def test_every_token_is_in_a_piece_or_counted(shapes: list[tuple[int, int]], longest: int) -> None:
    """Pieces in their order are the row's tokens, but for those of pieces that the ledger counts; trained tokens are
    the row's, but for the first of each piece."""
    rows = [
        row(f"r{number}", [100 * number + token for token in range(length)], untrained)
        for number, (length, untrained) in enumerate(shapes)
    ]
    for cut in (split, wrap):
        ledger = ledger_of(rows)
        pieces = cut(rows, longest, ledger)
        tokens = [token for piece in pieces for token in piece.token_ids]
        assert len(set(tokens)) == len(tokens) == ledger.tokens["used"]
        assert ledger.to_json()["tokens"]["input"] == sum(len(one.token_ids) for one in rows)
        assert all(len(piece.token_ids) <= longest for piece in pieces)
        trained = {token for one in rows for token, own in zip(one.token_ids, one.loss_mask, strict=True) if own}
        kept = {token for one in pieces for token, own in zip(one.token_ids, one.loss_mask, strict=True) if own}
        first = {piece.token_ids[0] for piece in pieces}
        assert kept <= trained and trained - kept <= first | (trained - set(tokens))


def ledger_of(rows: list[TokenizedSequence]) -> RowLedger:
    """Every row used whole, as before packing."""
    ledger = RowLedger()
    for one in rows:
        ledger.use(one.row_id, tokens=len(one.token_ids))
    return ledger


def test_wrapping_cuts_the_stream() -> None:
    rows = [row("a", [1, 2, 3, 4, 5]), row("b", [6, 7]), row("c", [8, 9, 10]), row("d", [11])]
    pieces = wrap(rows, 4, ledger_of(rows))
    assert [piece.token_ids for piece in pieces] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]
    # a row's first token is still not trained, nor is a piece's
    assert [piece.loss_mask for piece in pieces] == [
        [False, True, True, True],
        [False, False, True, False],
        [False, True, False],
    ]
