"""Runs of words that texts of one side have in common with texts of the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from stages.data.shingles import Hashes, Indices, Texts


@dataclass(frozen=True)
class Overlap:
    """Words `start` to `stop` of text `row` stand in text `train_row`, the first that holds most of what was found;
    `share` of all the row's runs stand in some text of the other side."""

    row: int
    train_row: int
    start: int
    stop: int
    share: float


@dataclass(frozen=True)
class Overlaps:
    """What was found of every text, and every text of the other side that it was found in."""

    rows: list[Overlap]
    train_rows: list[int]


def overlaps(theirs: Texts, ours: Texts, length: int, min_share: float) -> Overlaps:
    """Texts of `theirs` with runs of `length` words that stand in `ours`: one at least, and that share of their own."""
    hashes, places = theirs.runs(length)
    other_hashes, other_places = ours.runs(length)
    wanted = np.unique(hashes)
    if not len(wanted) or not len(other_hashes):
        return Overlaps([], [])
    at = np.minimum(np.searchsorted(wanted, other_hashes), len(wanted) - 1)
    met = wanted[at] == other_hashes
    found_hashes, found_places = other_hashes[met], other_places[met]
    known, first = np.unique(found_hashes, return_index=True)
    same = _same_words(theirs, places, hashes, ours, found_places[first], known, length)
    known, first_places = known[same], found_places[first][same]
    is_known = np.isin(hashes, known)
    rows = []
    kept: list[Hashes] = []
    texts = theirs.text_W[places]
    bounds = np.searchsorted(texts, np.arange(len(theirs) + 1))
    for row in np.unique(texts[is_known]).tolist():
        part = slice(bounds[row], bounds[row + 1])
        hits = np.flatnonzero(is_known[part])
        share = len(hits) / (bounds[row + 1] - bounds[row])
        if share < min_share:
            continue
        own = hashes[part][hits]
        kept.append(own)
        there = first_places[np.searchsorted(known, own)]
        rows.append(_longest(row, hits, there, ours.text_W[there], length, float(share)))
    if not kept:
        return Overlaps([], [])
    guilty = np.unique(ours.text_W[found_places[np.isin(found_hashes, np.concatenate(kept))]])
    return Overlaps(rows, guilty.tolist())


def _same_words(
    theirs: Texts, places: Indices, hashes: Hashes, ours: Texts, other_places: Indices, known: Hashes, length: int
) -> np.ndarray:
    """Whether the runs behind equal hashes are equal word for word."""
    order = np.argsort(hashes, kind="stable")
    here = places[order[np.searchsorted(hashes[order], known)]]
    equal = np.ones(len(known), bool)
    for step in range(length):
        equal &= theirs.words_W[here + step] == ours.words_W[other_places + step]
    return equal


def _longest(row: int, hits: Indices, there: Indices, sources: Indices, length: int, share: float) -> Overlap:
    """The longest stretch of runs one after the other, here and in the text that holds most of them."""
    train_row = Counter(sources.tolist()).most_common(1)[0][0]
    inside, there = hits[sources == train_row], there[sources == train_row]
    breaks = (np.diff(inside) != 1) | (np.diff(there) != 1)
    stretches = np.split(inside, np.flatnonzero(breaks) + 1)
    best = max(stretches, key=len)
    return Overlap(row, train_row, int(best[0]), int(best[-1]) + length, share)
