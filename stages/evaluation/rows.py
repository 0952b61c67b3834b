"""Which rows are looked at, and one ledger for all tasks of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from stages.data.ledger import RowLedger
from stages.data.types import ROW_ID, Dataset, Row, text_columns
from stages.seeds import generator

OUTSIDE_LIMIT = "filtered: not drawn by limit"
_OF_ITS_TYPE = ("label", "margin")
"""Columns that speak of a row's own completions."""


def draw_rows(dataset: Dataset, limit: int | None, seed: int) -> tuple[Dataset, list[str]]:
    """(`limit` rows drawn by the seed, in the dataset's order; ids of the others)."""
    if limit is None or limit >= len(dataset):
        return dataset, []
    drawn = set(generator(seed, "limit").permutation(len(dataset))[:limit].tolist())
    left_out = [row[ROW_ID] for index, row in enumerate(dataset) if index not in drawn]
    return dataset.select(sorted(drawn)), left_out


def extra_columns(dataset: Dataset, row: Row) -> Row:
    """The row's columns that are not of the dataset's type: answers, sources, whatever was kept."""
    known = {ROW_ID, "prompt", *text_columns(dataset.type, dataset.conversational), *_OF_ITS_TYPE}
    return {name: value for name, value in row.items() if name not in known}


class TaskLedger(RowLedger):
    """A ledger that remembers which row is in which state."""

    def __init__(self) -> None:
        super().__init__()
        self.row_states: dict[str, tuple[str, str]] = {}
        """Row id -> (state, detail)."""

    def use(self, rows: int | str = 1, *, tokens: int | None = None) -> None:
        """The row with that id is used whole."""
        assert isinstance(rows, str)
        super().use(rows, tokens=tokens)
        self.row_states[rows] = ("used", "")

    def drop(self, row_id: str, state: str, detail: str = "", *, tokens: int | None = None) -> None:
        """The row is not used, because of `state`."""
        super().drop(row_id, state, detail, tokens=tokens)
        self.row_states[row_id] = (state, detail)

    def truncate(self, row_id: str, tokens: int, *, kept: int | None = None) -> None:
        """The row is used without `tokens` of its tokens."""
        super().truncate(row_id, tokens, kept=kept)
        self.row_states[row_id] = ("truncated", f"{tokens} tokens cut")


def joint_ledger(ledgers: Mapping[str, TaskLedger], left_out: list[str]) -> RowLedger:
    """One state a row: that of all tasks where they agree, else `used: accuracy used, loss truncated`."""
    joint = RowLedger()
    for row_id in next(iter(ledgers.values())).row_states:
        found = {task: ledger.row_states[row_id] for task, ledger in ledgers.items()}
        states = {state for state, _ in found.values()}
        if states == {"used"}:
            joint.use(row_id)
            continue
        joint.drop(row_id, states.pop() if len(states) == 1 else _together(found), _details(found))
    for row_id in left_out:
        joint.drop(row_id, OUTSIDE_LIMIT)
    joint.truncated_tokens = max(ledger.truncated_tokens for ledger in ledgers.values())
    for ledger in ledgers.values():
        joint.changes |= ledger.changes
    return joint


def outcome_ledger(prompts: TaskLedger, reasons: Mapping[str, str], left_out: list[str]) -> RowLedger:
    """The ledger of a dataset made from prompts: those used before, less those that `reasons` names."""
    ledger = RowLedger()
    for row_id, (state, detail) in prompts.row_states.items():
        if state != "used":
            ledger.drop(row_id, state, detail)
        elif row_id in reasons:
            ledger.drop(row_id, reasons[row_id])
        else:
            ledger.use(row_id)
    for row_id in left_out:
        ledger.drop(row_id, OUTSIDE_LIMIT)
    ledger.changes |= prompts.changes
    return ledger


def _together(found: Mapping[str, tuple[str, str]]) -> str:
    kind = "used" if {"used", "truncated"} & {state for state, _ in found.values()} else "filtered"
    return f"{kind}: " + ", ".join(f"{task} {state}" for task, (state, _) in found.items())


def _details(found: Mapping[str, tuple[str, str]]) -> str:
    return "; ".join(dict.fromkeys(detail for _, detail in found.values() if detail))
