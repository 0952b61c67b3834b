"""Pieces of a file in order, of which the next ones are on their way while one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor


def fetched_ahead(fetch: Callable[[int, int], bytes], size: int, piece: int, ahead: int) -> Iterator[bytes]:
    """`fetch(start, end)` of every piece of so many bytes, `ahead` of them at once."""
    spans = [(start, min(start + piece, size)) for start in range(0, size, piece)]
    if len(spans) < 2:
        for span in spans:
            yield fetch(*span)
        return
    with ThreadPoolExecutor(ahead) as pool:
        coming = deque(pool.submit(fetch, *span) for span in spans[:ahead])
        for following in (*spans[ahead:], *(None,) * min(ahead, len(spans))):
            arrived = coming.popleft().result()
            if following is not None:
                coming.append(pool.submit(fetch, *following))
            yield arrived
