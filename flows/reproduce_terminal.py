"""What a person sees of a reproduction: what goes on, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from artifacts import Artifact
from flows.reporting.text import in_words, number
from flows.reproduce import Reproduction
from flows.tables import plain_table, short_id


@contextmanager
def following(artifact: Artifact) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A line on stderr that says how far the stage is."""
    console = Console(stderr=True, highlight=False)
    text = f"making {artifact.kind} {short_id(artifact.id)} again"
    with console.status(text) as status:

        def on_event(event: Mapping[str, Any]) -> None:
            if event["kind"] == "progress":
                status.update(Text(f"{text}: {event['unit']} {event['step']:,} of {event['total']:,}"))
            elif event["kind"] == "phase":
                status.update(Text(f"{text}: {event['text']}"))

        yield on_event


def reproduction_tables(found: Reproduction) -> list[RenderableType]:
    """The verdict first; then files, metrics and surroundings, where they differ."""
    name = f"{found.artifact.kind} {short_id(found.artifact.id)}"
    if found.same:
        parts: list[RenderableType] = [Text(f"{found.stage} made {name} again, bit for bit", style="green")]
    else:
        other = f"{found.stage} made {short_id(found.made.id)} instead of {name}; it lies in {found.folder}"
        parts = [Text(other, style="bold red")]
        files = plain_table("file", "what differs")
        for path, words in found.files.items():
            files.add_row(Text(path, style="bold"), Text(words))
        parts.append(files)
    for title, rows in (("metric", found.metrics), ("surroundings", found.surroundings)):
        if rows:
            listed = plain_table(title, "then", "now")
            for label, then, now in rows:
                listed.add_row(Text(label, style="bold"), Text(_value(then)), Text(_value(now)))
            parts.append(listed)
    if not found.same and not found.surroundings:
        parts.append(Text("libraries and machine are those that made it, as far as was recorded", style="dim"))
    return parts


def _value(value: Any) -> str:
    return in_words(value) if isinstance(value, list | dict) else number(value)
