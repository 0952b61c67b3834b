"""The work of the stage `normalize`: a pass that converts and counts, then one that writes what was selected."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.errors import DataError
from stages.data.dataset import write_dataset
from stages.data.first_pass import BAD, FirstPass, KeptRows, short_name
from stages.data.ledger import say_dropped
from stages.data.selection import held_out_indices, sample_indices
from stages.data.sources import Source, function_source, hub_source, mapped, path_source
from stages.data.types import ROW_ID, Row
from stages.external import HUB
from stages.identity import load_code

if TYPE_CHECKING:
    from stages.context import Context
    from stages.normalize import SourceConfig

LIMIT = "filtered: limit"
KINDS_TOLD = 10
"""Of bad rows, each with a line of the log."""


def normalize(context: Context) -> None:
    """Runs the stage. Raises DataError for anything wrong with the source or its rows."""
    with tempfile.TemporaryDirectory(dir=context.scratch) as folder:
        source = source_of(context.config.source, _pinned(context), Path(folder))
        with tempfile.TemporaryFile(dir=folder) as file:
            context.phase("reading the source")
            done = FirstPass(context.config, KeptRows(file))
            for row in source:
                done.take(row, source)
            if source.ignored:
                context.log(f"not read, no rows by their extension: {', '.join(source.ignored[:10])}")
            if not done.kept.contents:
                raise DataError(f"no row of the source is left ({_why_none(done)}); see source and filters")
            context.phase("writing the dataset")
            _write(context, source, done)


def _why_none(done: FirstPass) -> str:
    """What became of the rows, and where the first of the most frequent fault is."""
    ((state, _),) = done.ledger.states.most_common(1)
    example = done.ledger.to_json()["examples"][state][0]
    first = done.first_bad.get(state) or ", ".join(part for part in example.values() if part)
    return f"{done.ledger.summary()}; the first: {first}"


def source_of(config: SourceConfig, pinned: str | None, scratch: Path) -> Source:
    """The rows to come. `pinned`: the commit of a repository of the Hub."""
    if config.path is None:
        assert config.function is not None
        return function_source(load_code(config.function), short_name(config.function), config.arguments)
    if config.path.startswith(HUB):
        source = hub_source(config.path.removeprefix(HUB), config.subset, config.split, pinned)
    else:
        source = path_source(config.path, config.format, config.split, scratch)
    if config.function is None:
        return source
    return mapped(source, load_code(config.function), short_name(config.function), config.arguments)


def _pinned(context: Context) -> str | None:
    """The commit that the fingerprint was made of, so that a moved branch cannot change the rows."""
    path = context.spec.identity["config"]["source"].get("path")
    revision = path.get("revision") if isinstance(path, dict) else None
    return None if revision is None else str(revision)


def _write(context: Context, source: Source, done: FirstPass) -> None:
    config, kept = done.config, done.kept
    selected: Sequence[int] = range(len(kept.contents))
    if config.limit is not None:
        chosen = sample_indices(kept.contents, config.limit, config.seed)
        for index in selected:
            if index not in chosen:
                done.ledger.drop(kept.label(index, source), LIMIT)
        selected = sorted(chosen)
    splits = {"train": set(selected)}
    if config.test_size is not None:
        held = held_out_indices([kept.groups[index] for index in selected], config.test_size, config.seed)
        splits["test"] = {selected[index] for index in held}
        splits["train"] -= splits["test"]
    for name in splits:
        _write_split(context, source, done, splits, name)
        context.metrics["rows" if name == "train" else f"{name}_rows"] = len(splits[name])
    sizes = {name: len(rows) for name, rows in splits.items()}
    states = done.ledger.states
    told = Counter({state: count for state, count in states.items() if state not in done.first_bad})
    for state in done.first_bad:  # each of which has a line of its own
        told[BAD] += states[state]
    say_dropped(context, told, sizes if len(sizes) > 1 else {"used": len(selected)})
    for state in islice(done.first_bad, KINDS_TOLD):
        context.log(f"{BAD}, {states[state]} of this kind, the first: {done.first_bad[state]}")
    if (more := len(done.first_bad) - KINDS_TOLD) > 0:
        context.log(f"{BAD}, and {more} more kinds: the ledger has them")
    context.counts.update({"input": done.seen, "used": len(selected), **done.ledger.states, **done.ledger.changes})


def _write_split(context: Context, source: Source, done: FirstPass, splits: dict[str, set[int]], name: str) -> None:
    """One output; its ledger is over the whole source, the other split's rows in a state of their own."""
    ledger = copy.deepcopy(done.ledger)
    ledger.use(len(splits[name]))
    for other in splits:
        if other != name:
            ledger.move(len(splits[other]), f"in the {other} split")
    ledger.check(done.seen)
    assert done.types is not None
    write_dataset(
        context.output(name),
        _rows(done.kept, source, splits[name]),
        type=done.converter.type,
        conversational=done.converter.conversational,
        ledger=ledger,
        source={"parts": source.describe()},
        types=done.types,
    )


def _rows(kept: KeptRows, source: Source, selected: set[int]) -> Iterator[Row]:
    for index, row in enumerate(kept.rows()):
        if index in selected:
            part, position = kept.places[index]
            yield {ROW_ID: source.parts[part].row_id(position), **row}
