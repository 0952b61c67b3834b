"""Rows of a distillation between two tokenizers: the student's tokens, and the teacher's of the same text."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from artifacts.errors import DataError
from stages.data.common_ends import TokenGroup, common_groups
from stages.data.encode import require_type
from stages.data.ledger import RowLedger
from stages.data.privileged import TEACHER_PROMPT_TOO_LONG
from stages.data.readings import Reader, Reading, UnreadableError, calls_tools
from stages.data.tokenize import TokenizedPrompt, tokenize_prompts, tokenize_sequences
from stages.data.truncation import RowLimit
from stages.data.types import ROW_ID, SEQUENCE_TYPES, Dataset, Row
from stages.rollouts.requests import Completion
from stages.training.batch import Branch, Group
from stages.training.cross_tokenizer import Counterpart
from stages.training.distill_windows import NothingComparedError

UNALIGNED = "filtered: not read alike by both tokenizers"
UNREAD = "tokens of completions behind what the teacher can read"
_BOTH = "take a model whose tokenizer keeps texts as they are"


@dataclass(frozen=True)
class Limits:
    """The most tokens of a row, for each model, and of a prompt that is to be completed."""

    row: RowLimit
    prompt: RowLimit | None
    teacher: RowLimit
    teacher_context: int
    """Of the teacher's prompt and what the student wrote; the prompt alone has no more than `teacher`."""


@dataclass(frozen=True)
class _Aligned:
    """What is kept of a row until all are read: spans of every token would be many times its size."""

    own_ids: array[int]
    other_ids: array[int]
    edges: array[int]
    """Of each group where the student's tokens begin and end, and the teacher's."""

    @classmethod
    def of(cls, own: Reading, other: Reading, groups: Sequence[TokenGroup]) -> _Aligned:
        edges = (place for group in groups for side in group for place in (side.start, side.stop))
        return cls(array("i", own.token_ids), array("i", other.token_ids), array("i", edges))

    def groups(self) -> Iterator[TokenGroup]:
        edges = iter(self.edges)
        for first, last, start, stop in zip(edges, edges, edges, edges, strict=True):
            yield TokenGroup(range(first, last), range(start, stop))


@dataclass(frozen=True)
class CrossRows:
    """What two tokenizers make of rows and completions."""

    tokenizer: Any
    student: Reader
    teacher: Reader
    limits: Limits
    end_tokens: frozenset[int]
    """Those by which the student ends a completion."""
    skip_eos: bool
    seen: Callable[[Row], Row]
    """A row of prompts as the teacher sees it."""

    def given(self, dataset: Dataset, ledger: RowLedger) -> list[Group]:
        """Rows with their completions. One that a tokenizer changes, so that the two do not read the same, is dropped.

        Raises DataError where no row is left, or the dataset holds no completions, or no text to read again.
        """
        require_type(dataset, SEQUENCE_TYPES)
        if dataset.type == "pretokenized" or (dataset.type == "language_modeling" and dataset.conversational):
            what = "token ids" if dataset.type == "pretokenized" else "whole conversations"
            raise DataError(
                f"the dataset holds {what} ({dataset.type}), and cross_tokenizer compares how two models read a "
                "completion: normalize the source with type: prompt_completion"
            )
        found: dict[str, _Aligned] = {}
        kept: list[int] = []
        first = ""
        for index, row in enumerate(dataset):
            if dataset.type == "language_modeling":
                row = {**row, "prompt": "", "completion": row["text"]}
            try:
                found[row[ROW_ID]] = self._aligned(row)
                kept.append(index)
            except UnreadableError as error:
                first = first or f"row {row[ROW_ID]}: {error}"
                ledger.drop(row[ROW_ID], UNALIGNED, str(error))
        if not kept:
            _nothing_left(dataset, ledger, first)
        groups = []
        for sequence in tokenize_sequences(
            dataset.select(kept), self.tokenizer, max_length=self.limits.row, ledger=ledger
        ):
            aligned = found.pop(sequence.row_id)
            length, asked = len(sequence.token_ids), sum(sequence.loss_mask)
            assert sequence.token_ids == aligned.own_ids[:length].tolist()
            # what opens the completion in the generation prompt is none of what is asked for
            own = [
                group for group in aligned.groups() if group.own.stop <= length and sequence.loss_mask[group.own.start]
            ]
            read = [group for group in own if group.other.stop <= len(aligned.other_ids)]
            if unread := sum(len(group.own) for group in own) - sum(len(group.own) for group in read):
                ledger.change(UNREAD, sequence.row_id, f"the teacher reads {self.limits.teacher} tokens", unread)
            other_ids = aligned.other_ids.tolist()
            groups.append(self._group(sequence.row_id, [], sequence.token_ids, other_ids, read, asked, given=True))
        return groups

    def prompts(self, dataset: Dataset, ledger: RowLedger) -> list[TokenizedPrompt]:
        """Prompts that both can read and that fit in both models. Raises DataError where none is left."""
        found = tokenize_prompts(dataset, self.tokenizer, max_length=self.limits.prompt, ledger=ledger)
        kept, first = [], ""
        for prompt in found:
            state, detail = self._unusable(prompt.row)
            if state:
                first = first or f"row {prompt.row_id}: {detail}"
                ledger.take_back(prompt.row_id, state, detail, tokens=len(prompt.prompt_ids))
            else:
                kept.append(prompt)
        if not kept:
            _nothing_left(dataset, ledger, first)
        return kept

    def _unusable(self, row: Row) -> tuple[str, str]:
        reading = self.teacher.prompt(self.seen(row))
        if reading.problem is not None:
            return UNALIGNED, f"input teacher's tokenizer changes the text: {reading.problem}"
        longest = min(self.limits.teacher, self.limits.teacher_context - 1)
        if len(reading.token_ids) > longest:
            return TEACHER_PROMPT_TOO_LONG, f"{len(reading.token_ids)} tokens, at most {longest} fit"
        return "", ""

    def sampled(self, prompts: Sequence[TokenizedPrompt], completions: Sequence[Completion]) -> list[Group]:
        """Groups of a step, of what the student wrote. Of a text that the teacher's tokenizer changes, or that is cut
        within a character, what comes before that is compared.

        Raises NothingComparedError where that leaves nothing of any completion.
        """
        groups, problems = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            token_ids = completion.token_ids
            ended = completion.finished and token_ids[-1] in self.end_tokens
            own, text = self.student.written(token_ids, ended=ended)
            other = self.teacher.continued(self.seen(prompt.row), text, ended=own.end is not None)
            if other.problem is not None:
                problems.append(f"row {prompt.row_id}: {other.problem}")
            common = self._common(own, other.first(self.limits.teacher_context), first_own=0)
            asked = len(token_ids)
            prompt_ids, other_ids = prompt.prompt_ids, other.token_ids
            groups.append(self._group(prompt.row_id, prompt_ids, token_ids, other_ids, common, asked, given=False))
        if problems and not any(group.data.sizes for group in groups):
            raise NothingComparedError(
                f"input teacher's tokenizer changes what the student writes, so that nothing of a whole step can be "
                f"compared: {problems[0]}; {_BOTH}"
            )
        return groups

    def _aligned(self, row: Row) -> _Aligned:
        """Raises UnreadableError where one of the tokenizers, or its template, does not give the row back."""
        try:
            own, other = self._given(row, trimmed=False)
        except UnreadableError:
            own, other = self._given(row, trimmed=True)
        for reading, name in ((own, "model"), (other, "teacher")):
            if reading.problem is not None:
                raise UnreadableError(f"input {name}'s tokenizer changes the text: {reading.problem}")
        groups = self._common(own, other, first_own=1)
        if not groups:
            raise UnreadableError("no token of its completion begins and ends where one of the teacher's does")
        return _Aligned.of(own, other.first(self.limits.teacher), groups)

    def _given(self, row: Row, *, trimmed: bool) -> tuple[Reading, Reading]:
        readers = ((self.student, "model"), (self.teacher, "teacher"))
        if calls_tools(row):
            own, other = (_called(reader, row, name) for reader, name in readers)
            if own != other:
                raise UnreadableError(
                    f"the two chat templates show its tool calls as {own[:60]!r} and as {other[:60]!r}"
                )
        readings = []
        for reader, name in readers:
            try:
                readings.append(reader.given(row, trimmed=trimmed))
            except UnreadableError as error:
                raise UnreadableError(f"input {name}: {error}") from error
        return readings[0], readings[1]

    def _common(self, own: Reading, other: Reading, *, first_own: int) -> list[TokenGroup]:
        """Those that something comes before in both, and the ends."""
        groups = common_groups(own.part, other.part)
        if own.end is not None and other.end is not None and not self.skip_eos:
            groups.append(TokenGroup(range(own.end, own.end + 1), range(other.end, other.end + 1)))
        return [group for group in groups if group.own.start >= first_own and group.other.start >= 1]

    def _group(
        self,
        row_id: str,
        prefix_ids: Sequence[int],
        token_ids: Sequence[int],
        other_ids: Sequence[int],
        groups: Sequence[TokenGroup],
        asked: int,
        *,
        given: bool,
    ) -> Group:
        stop = groups[-1].other.stop if groups else 0
        teacher = Branch(other_ids[:stop], _mask(stop, [group.other for group in groups]))
        return Group(
            row_id,
            prefix_ids,
            (Branch(token_ids, _mask(len(token_ids), [group.own for group in groups])),),
            Counterpart(
                Group(row_id, (), (teacher,)),
                tuple((len(group.own), len(group.other)) for group in groups),
                asked,
                given,
            ),
        )


def _called(reader: Reader, row: Row, name: str) -> str:
    """Raises UnreadableError, too, where the template shows no tool calls at all: other rows may do without."""
    try:
        return reader.called(row)
    except (DataError, UnreadableError) as error:
        raise UnreadableError(f"input {name}: {error}") from error


def _mask(length: int, asked: Sequence[range]) -> list[bool]:
    mask = [False] * length
    for places in asked:
        mask[places.start : places.stop] = [True] * len(places)
    return mask


def _nothing_left(dataset: Dataset, ledger: RowLedger, first: str) -> NoReturn:
    raise DataError(
        f"none of the {len(dataset)} rows can be read by both models ({ledger.summary()}); {first}; {_BOTH}, or look "
        "at the rows"
    )
