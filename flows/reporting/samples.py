"""Samples of the evaluations, joined by row id: one card a row, one column a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.reporting.reading import Reader, artifact_of
from flows.reporting.text import clipped, number, turns
from flows.reporting.wiring import Wiring

MAX_CARDS = 200
MAX_PER_ANSWER = 4
"""Completions of one model for one row that a card shows."""
MAX_SCANNED = 20_000
"""Lines of one samples.jsonl that are searched for the rows of the cards."""

_TEXTS = ("prompt", "completion", "completions", "chosen", "rejected")
EXPECTED = ("answer", "reference", "expected", "solution", "target")
_HIDDEN = frozenset({"row_id", "correct", "index", "sample", "sample_index", *_TEXTS, *EXPECTED})
_SHOWN = frozenset({"reward", "score", "margin", "loss", "chosen_score", "rejected_score"})
"""Values that stand under an answer; the others appear on hovering."""


@dataclass(frozen=True)
class Answer:
    """One completion of one model: its turns, whether it was right (None: not judged), values, and the rest."""

    turns: tuple[tuple[str, str], ...]
    correct: bool | None
    values: tuple[tuple[str, str], ...]
    rest: str


@dataclass(frozen=True)
class Card:
    """One row of the dataset. `answers[i]` belongs to column i; empty where that model has no record."""

    row_id: str
    prompt: tuple[tuple[str, str], ...]
    expected: str
    answers: tuple[tuple[Answer, ...], ...]
    wrong: bool
    changed: bool


@dataclass
class Group:
    """The evaluations on one dataset whose records have the same shape."""

    data: str
    columns: list[tuple[str, str]] = field(default_factory=list)
    """(model, evaluation stage)"""
    cards: list[Card] = field(default_factory=list)
    judged: bool = False


@dataclass(frozen=True)
class Samples:
    groups: tuple[Group, ...]
    notes: tuple[str, ...]


Records = dict[str, list[dict[str, Any]]]


def read_samples(run: Mapping[str, Any], wiring: Wiring, reader: Reader) -> Samples:
    """Cards of every evaluation that wrote samples.jsonl: the first rows of the group's first evaluation."""
    members: dict[tuple[str, bool], list[tuple[str, Records]]] = {}
    wanted: dict[tuple[str, bool], set[str]] = {}
    for stage, entry in run["stages"].items():
        for output in (entry.get("outputs") or {}).values():
            if output["kind"] != "evaluation":
                continue
            data = wiring.data_of(stage)
            lines = reader.lines(artifact_of(output), "samples.jsonl", stage, MAX_SCANNED)
            for has_text, records in _by_row(lines, data, wanted).items():
                members.setdefault((data, has_text), []).append((stage, records))
    groups = [_group(data, found, wiring) for (data, _), found in members.items()]
    for group in groups:
        if len(group.cards) == MAX_CARDS:
            reader.note(f"{group.data}: the first {MAX_CARDS} rows are shown")
    return Samples(tuple(group for group in groups if group.cards), tuple(reader.notes))


def _by_row(lines: Any, data: str, wanted: dict[tuple[str, bool], set[str]]) -> dict[bool, Records]:
    """Records by row id, apart for those with and without generated text; only rows that get a card."""
    found: dict[bool, Records] = {}
    chosen: dict[bool, set[str]] = {}
    for record in lines:
        if "row_id" not in record:
            continue
        has_text = "completion" in record or "completions" in record
        row_id, key = str(record["row_id"]), (data, has_text)
        rows = wanted[key] if key in wanted else chosen.setdefault(has_text, set())
        if row_id not in rows:
            if key in wanted or len(rows) >= MAX_CARDS:
                continue
            rows.add(row_id)
        found.setdefault(has_text, {}).setdefault(row_id, []).append(record)
    for has_text, rows in chosen.items():
        wanted[data, has_text] = rows
    return found


def _group(data: str, members: Sequence[tuple[str, Records]], wiring: Wiring) -> Group:
    group = Group(data=data or "no dataset")
    group.columns = [(wiring.model_of(stage) or stage, stage) for stage, _ in members]
    for row_id in members[0][1]:
        group.cards.append(_card(row_id, [records.get(row_id, []) for _, records in members]))
    group.judged = any(
        answer.correct is not None for card in group.cards for column in card.answers for answer in column
    )
    return group


def _card(row_id: str, columns: Sequence[Sequence[dict[str, Any]]]) -> Card:
    answers = tuple(tuple(_answer(record) for record in column[:MAX_PER_ANSWER]) for column in columns)
    first = next(record for column in columns for record in column)
    verdicts = [tuple(answer.correct for answer in column) for column in answers if column]
    judged = any(verdict is not None for verdict in sum(verdicts, ()))
    compared = verdicts if judged else [tuple(answer.turns or answer.values for answer in c) for c in answers if c]
    expected = next((first[name] for name in EXPECTED if first.get(name) is not None), "")
    said = " ".join(text for _, text in turns(expected))
    return Card(
        row_id=row_id,
        prompt=tuple(turns(first.get("prompt"))),
        expected=clipped(said, 300),
        answers=answers,
        wrong=any(verdict is False for verdict in sum(verdicts, ())),
        changed=len(set(compared)) > 1,
    )


def _answer(record: Mapping[str, Any]) -> Answer:
    completion = record.get("completion", record.get("completions"))
    written = turns(completion)
    if len(written) == 1:  # who speaks in a completion is no news
        written = [("", written[0][1])]
    for name in ("chosen", "rejected"):
        if record.get(name) is not None:
            written += [(f"{name} {role}".strip(), text) for role, text in turns(record[name])]
    correct = record.get("correct")
    values = [
        (name, number(value))
        for name, value in record.items()
        if name not in _HIDDEN and isinstance(value, bool | int | float)
    ]
    return Answer(
        turns=tuple(written),
        correct=bool(correct) if isinstance(correct, bool | int | float) else None,
        values=tuple((name, value) for name, value in values if name in _SHOWN),
        rest=", ".join(f"{name} {value}" for name, value in values if name not in _SHOWN),
    )
