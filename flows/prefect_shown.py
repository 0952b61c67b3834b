"""How something is shown in Prefect, which never fails a run: what Prefect does not take is a warning in the log."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from stages.visible import visible

logger = logging.getLogger(__name__)


def show_table(rows: Sequence[Mapping[str, Any]], *named: str, title: str) -> None:
    """One mapping a row."""
    with only_shown():
        shown = [{name: _cell_of_json(value) for name, value in row.items()} for row in rows]
        create_table_artifact(shown, key=key(*named), description=title)


def show_text(lines: Sequence[str], *named: str, title: str) -> None:
    """Markdown."""
    with only_shown():
        create_markdown_artifact(visible("\n".join(lines)), key=key(*named), description=title)


def show_link(url: str, text: str, *named: str, title: str) -> None:
    """A link to something that the browser can open."""
    with only_shown():
        create_link_artifact(url, link_text=text, key=key(*named), description=title)


def key(*parts: str) -> str:
    """Prefect's keys are of lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def _cell_of_json(value: Any) -> Any:
    return visible(value) if isinstance(value, str) else value


def cell(text: str) -> str:
    """Text inside a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


@contextlib.contextmanager
def only_shown() -> Iterator[None]:
    """What goes wrong in the block is logged and goes no further."""
    try:
        yield
    except Exception as error:
        logger.warning("Prefect did not take what the run wanted to show: %s", error)
