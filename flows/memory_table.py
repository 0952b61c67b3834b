"""The table of `posttrain plan --memory`."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.memory import Prediction
from flows.tables import size_in_words
from stages.training.memory_phase import PARTS

_NOTE = (
    "At most, of one process: every micro-batch full, every row as long as max_length allows. On a CPU, `process` is "
    "Python with its libraries, and processes share the machine. `engine` is vLLM, of servers a process's share."
)


def memory_table(predicted: Mapping[str, Prediction]) -> RenderableType:
    """Each stage with its peak, what it is for, and what would make it fit."""
    parts = [part for part in PARTS if any(_part(one, part) for one in predicted.values())]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("stage", "peak", "in its", *parts, "fits", "smallest change that fits"):
        table.add_column(column, overflow="fold")
    for name, prediction in predicted.items():
        table.add_row(Text(name, style="bold"), *_cells(prediction, parts))
    return Group(table, Text(_NOTE, style="dim"))


def _cells(prediction: Prediction, parts: list[str]) -> list[RenderableType]:
    if prediction.unknown is not None:
        return [Text("unknown", style="yellow"), "", *([""] * len(parts)), "", Text(prediction.unknown)]
    worst = prediction.worst
    sizes = [size_in_words(_part(prediction, part)) if _part(prediction, part) else "" for part in parts]
    return [size_in_words(worst.total), worst.name, *sizes, *_verdict(prediction)]


def _verdict(prediction: Prediction) -> list[RenderableType]:
    assert prediction.limit is not None
    among = f" x {prediction.processes}" if prediction.processes > 1 else ""
    worst = prediction.worst
    where = f"{among} {'GPU' if prediction.device == 'cuda' else 'RAM'}" if worst.room is None else f" for {worst.name}"
    room = size_in_words(worst.room or prediction.limit) + where
    if prediction.fits:
        return [Text(f"yes, of {room}", style="green"), ""]
    change = prediction.change
    advice = (
        "none is known; take a smaller model or more memory"
        if change is None
        else _advice(change.words(), change.peak_bytes)
    )
    return [Text(f"no: {room}", style="red"), Text(advice)]


def _advice(words: str, peak_bytes: int) -> str:
    return f"{words}: {size_in_words(peak_bytes)}"


def _part(prediction: Prediction, part: str) -> float:
    return 0.0 if prediction.unknown is not None else prediction.worst.parts.get(part, 0.0)
