"""Evaluation rows that the training data holds, as the stage `contamination` found them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.reporting.reading import Reader, artifact_of
from flows.reporting.text import clipped, number, plain

MAX_PAIRS = 50
_NAMES = {
    "equal": "equal",
    "near": "nearly equal",
    "overlap": "a run of words in common",
    "within": "near duplicates inside the training data",
}


@dataclass(frozen=True)
class Comparison:
    """What one stage found. `kinds`: (kind in words, rows)."""

    stage: str
    contaminated: int
    rows: int
    train_rows: int
    train_found: int
    kinds: tuple[tuple[str, int], ...]
    pairs: tuple[tuple[str, str, str, str, str], ...]
    """(kind in words, row, training row, score, text in common)."""

    @property
    def share(self) -> float:
        return self.contaminated / self.rows if self.rows else 0.0


def read_contamination(run: Mapping[str, Any], reader: Reader) -> tuple[tuple[Comparison, ...], tuple[str, ...]]:
    """(every contamination.json of the run's outputs, what could not be read)."""
    found = []
    for stage, entry in run["stages"].items():
        for output in (entry.get("outputs") or {}).values():
            if output["kind"] != "contamination":
                continue
            content = reader.json(artifact_of(output), "contamination.json", stage, expected=True)
            if content:
                found.append(_comparison(stage, content))
    return tuple(found), tuple(reader.notes)


def _comparison(stage: str, content: Mapping[str, Any]) -> Comparison:
    kinds, pairs = content.get("rows_by_kind"), content.get("pairs")
    return Comparison(
        stage=stage,
        contaminated=_count(content, "contaminated_rows"),
        rows=_count(content, "evaluation_rows"),
        train_rows=_count(content, "train_rows"),
        train_found=_count(content, "train_rows_found"),
        kinds=tuple(
            (_NAMES.get(str(kind), str(kind)), count)
            for kind, count in (kinds.items() if isinstance(kinds, Mapping) else ())
            if isinstance(count, int)
        ),
        pairs=tuple(
            _pair(pair) for pair in (pairs if isinstance(pairs, list) else [])[:MAX_PAIRS] if isinstance(pair, Mapping)
        ),
    )


def _count(content: Mapping[str, Any], name: str) -> int:
    value = content.get(name)
    return value if isinstance(value, int) else 0


def _pair(pair: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    kind = plain(pair.get("kind", ""))
    row, train_row, text = (plain(pair.get(name, "")) for name in ("row", "train_row", "text"))
    return _NAMES.get(kind, kind), row, train_row, number(pair.get("score")), clipped(text, 300)
