"""Samples of the evaluations, joined by row id: one card a row, one column a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flows.reporting.reading import Reader, artifact_of
from flows.reporting.text import clipped, number, turns
from flows.reporting.wiring import Wiring

MAX_CARDS = 100
MAX_CHARACTERS = 400_000
"""Of all cards of a group; a card more is left out, but for the first FEW_CARDS."""
FEW_CARDS = 8
MAX_PER_ANSWER = 8
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
    """What a model said, `times` times: its turns, whether it was right (None: not judged), values, and the rest."""

    turns: tuple[tuple[str, str], ...]
    correct: bool | None
    values: tuple[tuple[str, str], ...]
    rest: str
    times: int = 1


@dataclass(frozen=True)
class Said:
    """What one model made of one row; no answers where it has no record. `values` are the same under all of them, as
    those of the row are; `right` of `judged` answers were."""

    answers: tuple[Answer, ...]
    values: tuple[tuple[str, str], ...]
    right: int
    judged: int

    @property
    def wrong(self) -> bool:
        return self.right < self.judged


@dataclass(frozen=True)
class Card:
    """One row of the dataset. `columns[i]` belongs to column i; `changed`: they do not agree in how many of their
    answers are right, or, where none is judged, in what these say."""

    row_id: str
    prompt: tuple[tuple[str, str], ...]
    expected: str
    columns: tuple[Said, ...]
    changed: bool

    @property
    def wrong(self) -> tuple[int, ...]:
        """The columns with an answer that is not right."""
        return tuple(index for index, said in enumerate(self.columns) if said.wrong)

    @property
    def size(self) -> int:
        """Characters of its texts."""
        said = [text for column in self.columns for answer in column.answers for _, text in answer.turns]
        return sum(map(len, [*said, *(text for _, text in self.prompt)]))


@dataclass
class Group:
    """The evaluations on one dataset whose records have the same shape."""

    data: str
    columns: list[tuple[str, str]] = field(default_factory=list)
    """(model, evaluation stage), the stage beside the model too where several evaluated it"""
    cards: list[Card] = field(default_factory=list)
    judged: bool = False
    compared: bool = False
    """Whether answers can agree: of numbers alone nearly none are equal."""
    several: bool = False
    """Whether a model answered a row more than once."""
    cut: bool = False
    """Whether there may be more rows than cards."""

    def wrong(self, column: int) -> int:
        """Rows with an answer of this column that is not right."""
        return sum(column in card.wrong for card in self.cards)


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
    group.columns = _labelled([(wiring.model_of(stage) or stage, stage) for stage, _ in members])
    group.cut, size = len(members[0][1]) == MAX_CARDS, 0
    for row_id in members[0][1]:
        card = _card(row_id, [records.get(row_id, []) for _, records in members])
        size += card.size
        if size > MAX_CHARACTERS and len(group.cards) >= FEW_CARDS:
            group.cut = True
            break
        group.cards.append(card)
    said = [column for card in group.cards for column in card.columns]
    group.judged = any(column.judged for column in said)
    group.compared = group.judged or any(answer.turns for column in said for answer in column.answers)
    group.several = any(sum(answer.times for answer in column.answers) > 1 for column in said)
    return group


def _labelled(columns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    models = [model for model, _ in columns]
    return [(f"{model} ({stage})" if models.count(model) > 1 else model, stage) for model, stage in columns]


def _card(row_id: str, columns: Sequence[Sequence[dict[str, Any]]]) -> Card:
    found = [[_answer(record) for record in column] for column in columns]
    first = next(record for column in columns for record in column)
    said = tuple(map(_said, found))
    shares = {column.right / column.judged for column in said if column.judged}
    texts = {tuple(sorted(answer.turns for answer in answers)) for answers in found if answers}
    expected = next((first[name] for name in EXPECTED if first.get(name) is not None), "")
    return Card(
        row_id=row_id,
        prompt=(*turns(first.get("prompt")), *_pair(first)),
        expected=clipped(" ".join(text for _, text in turns(expected)), 300),
        columns=said,
        changed=len(shares or texts) > 1,
    )


def _pair(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Both sides of a pair, which every model judged."""
    sides = ((name, turns(record.get(name))) for name in ("chosen", "rejected"))
    return [(name, text) for name, said in sides for _, text in said]


def _said(answers: Sequence[Answer]) -> Said:
    """Equal answers once, values that are the same under all of them apart."""
    shared = tuple(value for value in (answers[0].values if answers else ()) if all(value in a.values for a in answers))
    merged: dict[Answer, int] = {}
    for answer in answers:
        own = replace(answer, values=tuple(value for value in answer.values if value not in shared))
        merged[own] = merged.get(own, 0) + 1
    verdicts = [answer.correct for answer in answers if answer.correct is not None]
    kept = list(merged.items())[:MAX_PER_ANSWER]
    return Said(tuple(replace(answer, times=times) for answer, times in kept), shared, sum(verdicts), len(verdicts))


def _answer(record: Mapping[str, Any]) -> Answer:
    completion = record.get("completion", record.get("completions"))
    written = turns(completion)
    if len(written) == 1:  # who speaks in a completion is no news
        written = [("", written[0][1])]
    correct = record.get("correct")
    correct = bool(correct) if isinstance(correct, bool | int | float) else None
    values = [
        (name, number(value))
        for name, value in record.items()
        if name not in _HIDDEN and isinstance(value, bool | int | float) and not _says_no_more(name, value, correct)
    ]
    return Answer(
        turns=tuple(written),
        correct=correct,
        values=tuple((name, value) for name, value in values if name in _SHOWN),
        rest=", ".join(f"{name} {value}" for name, value in values if name not in _SHOWN),
    )


def _says_no_more(name: str, value: float, correct: bool | None) -> bool:
    """Of a reward that is the verdict."""
    return name.startswith(("reward", "score")) and correct is not None and value == correct
