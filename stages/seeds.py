"""Randomness from counters: every random number follows from the run's seed and what it is for.

No generator has a state that would have to be saved, so workers, ranks, order and resume cannot matter.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy


def derive(seed: int, *parts: int | str) -> int:
    """A 63-bit seed for one purpose: `derive(seed, "order", epoch)`, `derive(seed, "sample", row_id, 3)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *parts: int | str) -> numpy.random.Generator:
    """A NumPy generator (Philox, counter-based) for one purpose."""
    import numpy

    return numpy.random.Generator(numpy.random.Philox(derive(seed, *parts)))
