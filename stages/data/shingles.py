"""Texts as hashed words, and runs of words as numbers: what texts are compared by.

N texts, W words over all of them. A word is what is left of text after Unicode NFKC and case folding between characters
that are neither letters nor digits. Hashes have 64 bits and follow from the words alone.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Indices = np.ndarray[Any, np.dtype[np.int64]]

_WORD = re.compile(r"\w+")
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that multiplying by it loses nothing of 64 bits


def words_of(text: str) -> list[str]:
    """The words of a text, as they are compared."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


@dataclass(frozen=True)
class Texts:
    """`words_W[starts[i]:starts[i + 1]]` are the hashes of text i's words."""

    words_W: Hashes
    starts: Indices

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Hashes of every text's words."""
        known: dict[str, int] = {}
        words: list[int] = []
        starts = [0]
        for text in texts:
            for word in words_of(text):
                if word not in known:
                    known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
                words.append(known[word])
            starts.append(len(words))
        return cls(np.array(words, dtype=np.uint64), np.array(starts, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def text_W(self) -> Indices:
        """Which text each word is of."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def whole(self, index: int) -> bytes:
        """Equal for texts of equal words, and for no others (but for hashes that collide)."""
        return hashlib.sha256(self.words_W[self.starts[index] : self.starts[index + 1]].tobytes()).digest()

    def runs(self, length: int) -> tuple[Hashes, Indices]:
        """(hash of every run of `length` words inside a text, place of its first word in words_W)."""
        count = len(self.words_W) - length + 1
        if count <= 0:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        inside = np.flatnonzero(self.text_W[:count] == self.text_W[length - 1 :])
        return _joined([self.words_W[inside + step] for step in range(length)]), inside

    def shingles(self, length: int) -> list[Hashes]:
        """The set of every text's runs of words, sorted; of a shorter text its words as one."""
        hashes, places = self.runs(length)
        bounds = np.searchsorted(self.text_W[places], np.arange(len(self) + 1))
        found = []
        for index in range(len(self)):
            own = np.unique(hashes[bounds[index] : bounds[index + 1]])
            if not len(own):
                words = self.words_W[self.starts[index] : self.starts[index + 1]]
                own = _joined([words[place : place + 1] for place in range(len(words))])
            found.append(own)
        return found


def _joined(parts: list[Hashes]) -> Hashes:
    """One hash of what stands one after the other; its order counts, and how many there are."""
    if not parts:
        return np.empty(0, np.uint64)
    total = np.full_like(parts[0], len(parts))
    for part in parts:
        total = (total ^ part) * np.uint64(_FACTOR)
        total ^= total >> np.uint64(29)
    return total
