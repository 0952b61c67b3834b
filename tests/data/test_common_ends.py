"""Groups of tokens with equal ends, by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest

from stages.data.common_ends import Part, TokenGroup, common_groups, token_after
from stages.data.token_bytes import Span


def part(*stops: int, region: tuple[int, int] | None = None, start: int = 0) -> Part:
    """Tokens side by side that end at these bytes."""
    spans = [Span(*pair) for pair in pairwise((start, *stops))]
    return Part(spans, Span(*(region or (start, stops[-1] if stops else start))))


def groups(own: Part, other: Part) -> list[tuple[list[int], list[int]]]:
    return [(list(group.own), list(group.other)) for group in common_groups(own, other)]


def test_groups_close_where_both_end() -> None:
    assert groups(part(1, 3, 4, 6), part(2, 3, 6)) == [([0, 1], [0, 1]), ([2, 3], [2])]


def test_a_character_split_over_tokens_of_one_side() -> None:
    """a€b: bytes one by one here; a, €, b there."""
    assert groups(part(1, 2, 3, 4, 5), part(1, 4, 5)) == [([0], [0]), ([1, 2, 3], [1]), ([4], [2])]


def test_equal_tokens_are_groups_of_one() -> None:
    alone = [range(place, place + 1) for place in range(3)]
    assert common_groups(part(1, 5, 9), part(1, 5, 9)) == [TokenGroup(one, one) for one in alone]


def test_regions_begin_at_bytes_of_their_own() -> None:
    """The prompts are as long as they are: 3 bytes here, 10 there."""
    own, other = part(3, 4, 6, 7, region=(3, 6)), part(5, 10, 13, 15, region=(10, 13))
    assert groups(own, other) == [([1, 2], [2])]


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        # a token of the prompt's end and the completion's beginning: what stands beside it is in no group either
        (part(4, 5, 6, region=(3, 6)), part(1, 2, 3, region=(0, 3)), [([1], [1]), ([2], [2])]),
        # the same at the end
        (part(1, 2, 4, region=(0, 3)), part(1, 2, 3, region=(0, 3)), [([0], [0]), ([1], [1])]),
        # one that ends at the same distance by chance, behind both regions
        (part(2, 4, region=(0, 3)), part(2, 4, region=(0, 3)), [([0], [0])]),
        # cut off: what has no counterpart is left
        (part(1, 2, 3), part(1, 3, region=(0, 3)), [([0], [0]), ([1, 2], [1])]),
        (part(1, 2), part(1, 3), [([0], [0])]),
        # nothing on one side
        (part(region=(0, 0)), part(1, 2), []),
        (part(1, 2, region=(1, 1)), part(1, 2, region=(2, 2)), []),
    ],
)
def test_edges(own: Part, other: Part, expected: list[tuple[list[int], list[int]]]) -> None:
    assert groups(own, other) == expected
    assert groups(other, own) == [(second, first) for first, second in expected]


def test_a_token_without_bytes_goes_with_the_next() -> None:
    assert groups(part(1, 1, 2), part(1, 2)) == [([0], [0]), ([1, 2], [1])]


def test_the_token_behind_a_region() -> None:
    assert token_after(part(3, 5, 5, 6, region=(3, 5))) == 2
    assert token_after(part(3, 5, 6, region=(3, 4))) is None  # none begins there
    assert token_after(part(3, 4, region=(3, 4))) is None
    assert token_after(part(3, 4, 6, region=(3, 3))) == 1
