"""A reward that costs nothing and differs between completions: what on-line steps are measured with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def even_share(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """The share of even tokens in every completion."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
