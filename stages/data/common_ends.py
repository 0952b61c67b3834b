"""Groups of tokens of two tokenizers that begin and end at the same bytes of a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stages.data.token_bytes import Span


class TokenGroup(NamedTuple):
    """Tokens of both that stand for the same bytes, as ranges of their places."""

    own: range
    other: range


class Part(NamedTuple):
    """A part of a text, and where the tokens of the text are in it."""

    spans: Sequence[Span]
    region: Span


def common_groups(own: Part, other: Part) -> list[TokenGroup]:
    """The smallest groups that lie wholly within both regions, which hold equal bytes; in order.

    Walks over both, ahead on the side whose token ends first; a group closes where both end at the same byte. A token
    of no bytes goes with those that follow. Tokens that reach over the edge of a region are in no group, and neither
    are those of the other that stand beside them.
    """
    return [group for group in _closed(own, other) if _inside(own, group.own) and _inside(other, group.other)]


def _closed(own: Part, other: Part) -> Iterator[TokenGroup]:
    first, second = _tokens(own), _tokens(other)
    start, stop = first.start, second.start
    i, j = start, stop
    while i < first.stop and j < second.stop:
        ends = own.spans[i].stop - own.region.start, other.spans[j].stop - other.region.start
        i += ends[0] <= ends[1]
        j += ends[1] <= ends[0]
        if ends[0] == ends[1]:
            yield TokenGroup(range(start, i), range(stop, j))
            start, stop = i, j


def _tokens(part: Part) -> range:
    """Those that have bytes in the region, and what stands between them."""
    places = [place for place, span in enumerate(part.spans) if _overlaps(span, part.region)]
    return range(places[0], places[-1] + 1) if places else range(0)


def _overlaps(span: Span, region: Span) -> bool:
    return max(span.start, region.start) < min(span.stop, region.stop)


def _inside(part: Part, places: range) -> bool:
    return part.spans[places.start].start >= part.region.start and part.spans[places[-1]].stop <= part.region.stop


def token_after(part: Part) -> int | None:
    """The place of the first token behind a region, where a token begins there."""
    first = _tokens(part).stop
    behind = (place for place in range(first, len(part.spans)) if part.spans[place].start >= part.region.stop)
    place = next(behind, None)
    return place if place is not None and part.spans[place].start == part.region.stop else None
