"""Rows of a whole dataset in packs of one size, so that every step has about the same number of tokens.

What is planned here follows from the rows' lengths alone: neither workers nor map batches can change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stages.data.ledger import RowLedger
from stages.data.tokenize import TokenizedSequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs of indices with at most `capacity` tokens each: the longest first, each into the fullest pack with room.

    Johnson 1973; at most 11/9 of the least number of packs, and one. Ties go by index. A row longer than the capacity
    is a ValueError. Time grows with the number of rows, not with that of packs: `open_[r]` holds the packs with r
    tokens of room, and the bits of `rooms` say which of these lists are not empty.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if order and lengths[order[0]] > capacity:
        raise ValueError(f"row {order[0]} has {lengths[order[0]]} tokens, a pack holds {capacity}")
    packs: list[list[int]] = []
    open_: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for index in order:
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = open_[room].pop()
            if not open_[room]:
                rooms ^= 1 << room
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        left = room - length
        if left:
            open_[left].append(pack)
            rooms |= 1 << left
    return packs


def split(rows: Sequence[TokenizedSequence], longest: int, ledger: RowLedger) -> list[TokenizedSequence]:
    """Rows of more than `longest` tokens in pieces, `row#1`, `row#2`, ...; a piece without trained tokens is left out,
    and counted.

    The first token of a piece has nothing before it that predicts it, so it is not trained.
    """
    pieces = []
    for row in rows:
        if len(row.token_ids) <= longest:
            pieces.append(row)
            continue
        for number, start in enumerate(range(0, len(row.token_ids), longest), start=1):
            piece = _slice(row, start, start + longest)
            if any(piece.loss_mask):
                pieces.append(replace(piece, row_id=f"{row.row_id}#{number}"))
            else:
                ledger.mask_part(row.row_id, len(piece.token_ids))
    return pieces


def wrap(rows: Sequence[TokenizedSequence], size: int, ledger: RowLedger) -> list[TokenizedSequence]:
    """All rows one after the other, cut every `size` tokens; rows see what stands before them in their piece."""
    whole = TokenizedSequence(
        "wrapped",
        [token for row in rows for token in row.token_ids],
        [trained for row in rows for trained in row.loss_mask],
    )
    return split([whole], size, ledger) if len(whole.token_ids) > size else [whole]


def _slice(row: TokenizedSequence, start: int, stop: int) -> TokenizedSequence:
    mask = row.loss_mask[start:stop]
    return TokenizedSequence(row.row_id, row.token_ids[start:stop], [False, *mask[1:]])


def fill(lengths: Sequence[int], packs: int, capacity: int) -> float:
    """Share of the packs' tokens that rows take."""
    return sum(lengths) / (packs * capacity)
