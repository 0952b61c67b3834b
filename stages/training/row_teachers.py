"""Which of several teachers teaches a row: what a column of the dataset says, and the groups that know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from artifacts.errors import DataError
from stages.context import Context
from stages.data.dataset import read_dataset
from stages.data.ledger import RowLedger
from stages.data.tokenize import TokenizedPrompt
from stages.data.types import ROW_ID, Dataset, Row
from stages.names import nearest
from stages.rollouts.requests import Completion
from stages.training.batch import Group
from stages.training.distill_windows import Rows


@dataclass(frozen=True)
class OfTeacher:
    """What a group's data is: the number of its teacher, and what that one's objective needs to know of the group."""

    teacher: int
    data: Any


@dataclass(frozen=True)
class Choice:
    """A column that names one of so many teachers."""

    column: str
    names: Sequence[str]
    """No names: they go by number."""
    teachers: int

    @property
    def labels(self) -> list[str]:
        """What people call the teachers, in order."""
        return list(self.names) or [str(number) for number in range(self.teachers)]

    def of(self, row: Row) -> int:
        """The number of a row's teacher. Raises DataError where the row names none."""
        said = row.get(self.column)
        known = self.names if self.names else range(self.teachers)
        if said is not None and not isinstance(said, bool) and said in known:
            return known.index(said)
        there = f"there are {', '.join(map(repr, known))} ({'teacher_names' if self.names else 'their numbers'})"
        where = f"row {row[ROW_ID]}: field {self.column!r}"
        if said is None:
            raise DataError(f"{where}: names no teacher; {there}")
        hint = nearest(said, self.names) if isinstance(said, str) else ""
        raise DataError(f"{where}: no teacher is called {said!r}{hint}; {there}")

    def check(self, context: Context, name: str) -> None:
        """Every row of this input names one. Raises DataError for the first that does not."""
        try:
            self.of_rows(read_dataset(context.input(name)))
        except DataError as error:
            raise DataError(f"input {name}: {error}") from error

    def of_rows(self, dataset: Dataset) -> dict[str, int]:
        """Row id -> number of the row's teacher."""
        if self.column not in dataset.columns:
            raise DataError(
                f"there is no column {self.column!r} (teacher_column), which says the teacher of every row; found "
                f"columns: {', '.join(dataset.columns)}"
            )
        return {row[ROW_ID]: self.of(row) for row in dataset}


@dataclass(frozen=True)
class RowsOfTeachers:
    """What student and teachers make of rows, each group with the number of its teacher."""

    rows: Rows
    choice: Choice

    def given(self, dataset: Dataset, ledger: RowLedger) -> list[Group]:
        """Rows with their completions."""
        teachers = self.choice.of_rows(dataset)
        return [_taught(group, teachers[group.row_id]) for group in self.rows.given(dataset, ledger)]

    def prompts(self, dataset: Dataset, ledger: RowLedger) -> list[TokenizedPrompt]:
        """Prompts that the student is to complete."""
        return self.rows.prompts(dataset, ledger)

    def sampled(self, prompts: Sequence[TokenizedPrompt], completions: Sequence[Completion]) -> list[Group]:
        """Groups of a step, of what the student wrote."""
        groups = self.rows.sampled(prompts, completions)
        return [_taught(group, self.choice.of(one.row)) for group, one in zip(groups, prompts, strict=True)]


def _taught(group: Group, teacher: int) -> Group:
    return replace(group, data=OfTeacher(teacher, group.data))
