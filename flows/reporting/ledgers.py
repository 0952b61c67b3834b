"""What became of every row: the ledgers of the datasets and training stages, as stacked bars and tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from artifacts import Artifact
from flows.reporting.reading import Reader, artifact_of
from flows.reporting.text import clipped, plain

MAX_EXAMPLES = 5
MOST_STEPS = 1_000_000
PIECE = re.compile(r"(#\d+|/chosen|/rejected)$")
"""What steps add to a row's id: which piece of a long row, or which side of a pair, they trained on."""


@dataclass(frozen=True)
class State:
    """One end of rows: how many, their share of the input, where its piece of the bar lies (0 to 100)."""

    name: str
    kind: str
    count: int
    tokens: int | None
    """Of `used`, those that are left of truncated rows too; of `truncated`, those cut off. None: not known."""
    share: float
    start: float
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Ledger:
    """The ledger of one output of one stage."""

    stage: str
    output: str
    rows: int
    tokens: int | None
    """Of the rows whose tokens are known; None: of none."""
    truncated_tokens: int
    states: tuple[State, ...]
    problem: str | None
    seen: int | None = None
    """Rows that a step trained on, where the steps ended before all rows for training had their turn."""

    @property
    def is_full(self) -> bool:
        """Every row was used, and used whole."""
        states = {state.name for state in self.states if state.count}
        return states <= {"used"} and not self.truncated_tokens and self.problem is None and self.seen is None

    @property
    def trainable(self) -> int:
        """Rows that are used, whole or cut."""
        return sum(state.count for state in self.states if state.kind in ("used", "truncated"))


@dataclass(frozen=True)
class Ledgers:
    """`full`: of which there is nothing to tell but that every row was used."""

    ledgers: tuple[Ledger, ...]
    full: tuple[Ledger, ...]
    kinds: frozenset[str]
    """The kinds of states that occur."""
    notes: tuple[str, ...]


def read_ledgers(run: Mapping[str, Any], reader: Reader) -> Ledgers:
    """Every ledger.json of the run's outputs."""
    ledgers = []
    for stage, entry in run["stages"].items():
        for name, output in (entry.get("outputs") or {}).items():
            artifact = artifact_of(output)
            content = reader.json(artifact, "ledger.json", stage, expected=output["kind"] == "dataset")
            if content:
                ledger = _ledger(stage, name, content, reader)
                # rows of `rollouts` are completions, and steps name prompts
                is_of_dataset = "dataset" in (entry.get("inputs") or {})
                ledgers.append(replace(ledger, seen=_seen(artifact, ledger, reader)) if is_of_dataset else ledger)
    return Ledgers(
        ledgers=tuple(ledger for ledger in ledgers if not ledger.is_full),
        full=tuple(ledger for ledger in ledgers if ledger.is_full),
        kinds=frozenset(state.kind for ledger in ledgers for state in ledger.states),
        notes=tuple(reader.notes),
    )


def _seen(artifact: Artifact, ledger: Ledger, reader: Reader) -> int | None:
    """Rows in the records of steps; None: there are none, or every row is in them."""
    rows: set[str] = set()
    for line in reader.lines(artifact, "steps.jsonl", ledger.stage, MOST_STEPS):
        found = line.get("rows")
        rows.update(PIECE.sub("", str(row)) for row in (found if isinstance(found, list) else ()))
    return len(rows) if 0 < len(rows) < ledger.trainable else None


def counts_of(ledger: Mapping[str, Any]) -> dict[str, int]:
    """State -> rows, of what ledger.json says."""
    written = ledger.get("states")
    return {
        str(name): count
        for name, count in (written.items() if isinstance(written, Mapping) else ())
        if isinstance(count, int) and count >= 0
    }


def _ledger(stage: str, output: str, content: Mapping[str, Any], reader: Reader) -> Ledger:
    counts = counts_of(content)
    rows, total = content.get("input"), sum(counts.values())
    tokens, token_counts = _tokens(content.get("tokens"))
    problem = None
    if rows != total:
        problem = f"the states sum to {total:,}, the input was {plain(rows)} rows"
    elif tokens is not None and tokens != sum(token_counts.values()):
        problem = f"the states sum to {sum(token_counts.values()):,} tokens, the input had {tokens:,}"
    if problem is not None:
        reader.note(f"{stage}: its ledger does not add up: {problem}")
    examples = content.get("examples")
    states, start = [], 0.0
    for name in sorted(counts, key=lambda name: (_kind(name) != "used", -counts[name], name)):
        share = counts[name] / total if total else 0.0
        found = examples.get(name) if isinstance(examples, Mapping) else None
        states.append(State(name, _kind(name), counts[name], token_counts.get(name), share, start, _examples(found)))
        start += 100 * share
    cut = content.get("truncated_tokens")
    return Ledger(stage, output, total, tokens, cut if isinstance(cut, int) else 0, tuple(states), problem)


def _tokens(written: Any) -> tuple[int | None, dict[str, int]]:
    """(tokens of the input, tokens by state) of a ledger that counts them."""
    if not isinstance(written, Mapping) or not isinstance(written.get("input"), int):
        return None, {}
    return written["input"], counts_of(written)


def _kind(state: str) -> str:
    """`filtered: too long` is of kind `filtered`; the kind gives the colour."""
    kind = state.partition(":")[0].strip()
    return kind if kind in ("used", "truncated", "filtered", "duplicate", "masked") else "other"


def _examples(found: Any) -> tuple[tuple[str, str], ...]:
    entries = [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
    return tuple(
        (plain(entry.get("row", "")), clipped(plain(entry.get("detail", "")), 300)) for entry in entries[:MAX_EXAMPLES]
    )
