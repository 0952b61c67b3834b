"""The work of the stage `contamination`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from artifacts.errors import DataError
from stages.data.dataset import read_dataset, write_dataset
from stages.data.ledger import RowLedger, say_dropped
from stages.data.minhash import similar_pairs
from stages.data.overlap import Overlaps, overlaps
from stages.data.shingles import Texts, words_of
from stages.data.types import ROW_ID, Dataset, Row, text_columns
from stages.names import nearest

if TYPE_CHECKING:
    from stages.contamination import Config
    from stages.context import Context

KINDS = {
    "equal": "filtered: equals an evaluation row",
    "near": "filtered: near duplicate of an evaluation row",
    "overlap": "filtered: overlaps an evaluation row",
    "within": "duplicate: near duplicate of an earlier row",
}
"""How a training row was found -> its state in the ledger; the first that holds counts."""

SHOWN_CHARACTERS = 300
SHOWN_PAIRS = 200
"""Pairs of contamination.json, which the report shows; pairs.jsonl has all."""


@dataclass(frozen=True)
class Pair:
    """An evaluation row (of kind `within`: a training row) and a training row that holds it."""

    kind: str
    row: str
    train_row: str
    score: float
    """Jaccard similarity, or of kind overlap the share of the row's runs of words that stand in training rows."""
    text: str
    """What they have in common; of near duplicates, the text of `row`."""


@dataclass(frozen=True)
class Side:
    """Row ids and texts of one side."""

    ids: list[str]
    words: list[str]
    """A text each, as its words with a blank between them."""
    texts: Texts

    @classmethod
    def of(cls, parts: Sequence[tuple[Dataset, Sequence[str]]]) -> Side:
        """The rows of datasets, each with the columns that count."""
        ids, words = [], []
        for dataset, columns in parts:
            for row in dataset:
                ids.append(str(row[ROW_ID]))
                words.append(" ".join(words_of(text_of(row, columns))))
        return cls(ids, words, Texts.of(words))


def compare(context: Context) -> None:
    """Runs the stage. Raises DataError where there is no text to compare."""
    config: Config = context.config
    train = read_dataset(context.input("train"))
    evaluation = [read_dataset(folder) for folder in context.inputs_of("evaluation")]
    context.phase("reading the texts")
    ours = Side.of([(train, _columns(config, train, evaluation))])
    theirs = Side.of([(dataset, _columns(config, dataset, [train])) for dataset in evaluation])
    context.phase("comparing")
    shared = Overlaps([], [])
    if config.ngram_size is not None:
        shared = overlaps(theirs.texts, ours.texts, config.ngram_size, config.min_overlap)
    pairs = [*_equal_pairs(theirs, ours), *_near_pairs(config, theirs, ours), *_overlapping(shared, theirs, ours)]
    found = {kind: len({pair.row for pair in pairs if pair.kind == kind}) for kind in ("equal", "near", "overlap")}
    contaminated = len({pair.row for pair in pairs})
    flagged = _flagged(pairs, shared, theirs, ours)
    if config.within_train:
        inside = _pairs_within(config, ours)
        pairs += inside
        for pair in inside:
            flagged.setdefault(pair.row, "within")
        found["within"] = len({pair.row for pair in inside})
    summary = {
        "train_rows": len(ours.ids),
        "evaluation_rows": len(theirs.ids),
        "contaminated_rows": contaminated,
        "contaminated_rate": contaminated / len(theirs.ids),
        "rows_by_kind": found,
        "train_rows_found": len(flagged),
    }
    context.metrics.update({"contaminated_rate": summary["contaminated_rate"], "contaminated_rows": contaminated})
    context.counts.update({"train": len(ours.ids), "evaluation": len(theirs.ids), "train found": len(flagged)})
    _write_report(context, summary, pairs)
    if config.remove:
        _write_train(context, train, flagged)


def text_of(row: Row, columns: Sequence[str]) -> str:
    """The row's text in these columns, of messages their contents."""
    parts: list[str] = []
    for column in columns:
        value = row[column]
        if isinstance(value, list):
            parts += [str(message["content"]) for message in value]
        else:
            parts.append(str(value))
    return "\n".join(parts)


def _columns(config: Config, dataset: Dataset, others: Sequence[Dataset]) -> Sequence[str]:
    """What is compared of a dataset's rows."""
    if config.columns is not None:
        for column in config.columns:
            if column not in dataset.columns:
                hint = nearest(column, dataset.columns)
                raise DataError(f"a dataset has no column {column!r}{hint}; it has {', '.join(dataset.columns)}")
        return config.columns
    own = text_columns(dataset.type, dataset.conversational)
    if not own:
        raise DataError(f"a {dataset.type} dataset has no text to compare; give columns, or the rows as text")
    shared = [column for column in own if all(column in text_columns(one.type, one.conversational) for one in others)]
    return shared or own


def _equal_pairs(theirs: Side, ours: Side) -> list[Pair]:
    first: dict[bytes, int] = {}
    for index in range(len(ours.ids)):
        first.setdefault(ours.texts.whole(index), index)
    pairs = []
    for index, row in enumerate(theirs.ids):
        place = first.get(theirs.texts.whole(index))
        if place is not None and theirs.words[index]:
            pairs.append(Pair("equal", row, ours.ids[place], 1.0, _shown(theirs.words[index])))
    return pairs


def _near_pairs(config: Config, theirs: Side, ours: Side) -> list[Pair]:
    """Those that are not equal."""
    left, left_sets = _with_words(theirs, config.shingle_size)
    right, right_sets = _with_words(ours, config.shingle_size)
    return [
        Pair("near", theirs.ids[left[one]], ours.ids[right[other]], value, _shown(theirs.words[left[one]]))
        for one, other, value in _similar(left_sets, right_sets, config)
        if theirs.words[left[one]] != ours.words[right[other]]
    ]


def _pairs_within(config: Config, ours: Side) -> list[Pair]:
    """Every training row with an earlier one that it resembles."""
    rows, sets = _with_words(ours, config.shingle_size)
    return [
        Pair("within", ours.ids[rows[other]], ours.ids[rows[one]], value, _shown(ours.words[rows[other]]))
        for one, other, value in similar_pairs(sets, None, config.similarity, config.seed)
    ]


def _similar(left: list[Any], right: list[Any], config: Config) -> list[tuple[int, int, float]]:
    return similar_pairs(left, right, config.similarity, config.seed) if left and right else []


def _with_words(side: Side, size: int) -> tuple[list[int], list[Any]]:
    """(indices of the rows that have a word, their sets of runs)."""
    found = [(index, own) for index, own in enumerate(side.texts.shingles(size)) if len(own)]
    return [index for index, _ in found], [own for _, own in found]


def _overlapping(shared: Overlaps, theirs: Side, ours: Side) -> list[Pair]:
    return [
        Pair(
            "overlap",
            theirs.ids[found.row],
            ours.ids[found.train_row],
            found.share,
            _shown(" ".join(theirs.words[found.row].split(" ")[found.start : found.stop])),
        )
        for found in shared.rows
    ]


def _flagged(pairs: Sequence[Pair], shared: Overlaps, theirs: Side, ours: Side) -> dict[str, str]:
    """Training row -> how it was found: every one, where a pair names the first only."""
    flagged: dict[str, str] = {}
    equal = {theirs.texts.whole(index) for index, words in enumerate(theirs.words) if words}
    for index, row in enumerate(ours.ids):
        if ours.texts.whole(index) in equal:
            flagged[row] = "equal"
    for pair in pairs:
        if pair.kind == "near":
            flagged.setdefault(pair.train_row, "near")
    for index in shared.train_rows:
        flagged.setdefault(ours.ids[index], "overlap")
    return flagged


def _shown(words: str) -> str:
    return words if len(words) <= SHOWN_CHARACTERS else words[:SHOWN_CHARACTERS] + "…"


def _write_report(context: Context, summary: dict[str, Any], pairs: Sequence[Pair]) -> None:
    folder = context.output("contamination")
    records = [asdict(pair) for pair in pairs]
    told = {**summary, "pairs": records[:SHOWN_PAIRS]}
    (folder / "contamination.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _write_train(context: Context, train: Dataset, flagged: dict[str, str]) -> None:
    ledger = RowLedger()
    kept = []
    for row in train:
        if row[ROW_ID] in flagged:
            ledger.drop(row[ROW_ID], KINDS[flagged[row[ROW_ID]]])
        else:
            ledger.use(row[ROW_ID])
            kept.append(row)
    ledger.check(len(train))
    say_dropped(context, ledger.states)
    write_dataset(
        context.output("train"),
        kept,
        type=train.type,
        conversational=train.conversational,
        ledger=ledger,
        source={"without": "rows found in the evaluation data"},
    )
