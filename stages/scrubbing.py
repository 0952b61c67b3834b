"""What a stage prints, without the secrets of its environment and without what steers a terminal.

Clients quote keys in their errors, and user code prints what it likes; both end in logs that many people read.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from artifacts import scrub
from stages.visible import visible


class ScrubbedStream(io.TextIOBase):
    """Passes whole lines on without live secrets and passwords in URLs; the last line once it is flushed."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._line = ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).replace("\r", "\n").split("\n")
        if lines:
            self._stream.write(visible(scrub("\n".join(lines))) + "\n")
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        if self._line:
            self._stream.write(visible(scrub(self._line)))
            self._line = ""
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()


@contextmanager
def scrubbed_output() -> Iterator[None]:
    """Standard output and error of this process as `ScrubbedStream`s."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = ScrubbedStream(sys.stdout), ScrubbedStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
