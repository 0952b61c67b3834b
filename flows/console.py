"""Where tables for people go: a terminal with its width, or a file or pipe, whose lines end where the text does."""

from __future__ import annotations

import os
from io import TextIOWrapper
from typing import Any

from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command line what a reader that has gone means."""
        raise BrokenPipeError

    def print(self, *objects: Any, **options: Any) -> None:
        """Without the blanks that fill a table's last column, where nobody looks at a terminal."""
        if self.is_terminal:
            super().print(*objects, **options)
            return
        with self.capture() as captured:
            super().print(*objects, **options)
        lines = captured.get().split("\n")
        self.file.write("\n".join(line.rstrip(" ") for line in lines))
        self.file.flush()


def console_of(*, stderr: bool = False, width_of_files: int) -> Console:
    """A terminal's own width; into a file or pipe what COLUMNS says, and without it `width_of_files`, at which no table
    is torn. Characters that an encoding such as ASCII lacks become question marks."""
    console = _Console(stderr=stderr, highlight=False)
    if isinstance(console.file, TextIOWrapper) and console.file.errors == "strict":
        console.file.reconfigure(errors="replace")
    if console.file.isatty():
        return console
    columns = os.environ.get("COLUMNS", "")
    console.width = int(columns) if columns.isdecimal() and int(columns) > 0 else width_of_files
    return console
