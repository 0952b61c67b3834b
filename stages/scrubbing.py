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
from artifacts.sealed import scrub_last, settled
from stages.visible import visible


class ScrubbedStream(io.TextIOBase):
    """Passes whole lines on without live secrets and passwords in URLs; the last line once it is flushed, but for an
    end that may be the beginning of a secret: that waits for what comes after it."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._waiting = ""

    def write(self, text: str) -> int:
        self._waiting += text.replace("\r", "\n")
        if "\n" in text or "\r" in text:
            self._pass_on(self._waiting.rindex("\n") + 1)
        return len(text)

    def flush(self) -> None:
        self._pass_on(len(self._waiting))

    def finish(self) -> None:
        """The output ends here: nothing more will come after what waits."""
        self._stream.write(visible(scrub_last(self._waiting)))
        self._waiting = ""
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def _pass_on(self, size: int) -> None:
        """As much of the first `size` letters as may be shown."""
        size = settled(self._waiting[:size])
        if size:
            self._stream.write(visible(scrub(self._waiting[:size])))
            self._waiting = self._waiting[size:]
        self._stream.flush()


@contextmanager
def scrubbed_output() -> Iterator[None]:
    """Standard output and error of this process as `ScrubbedStream`s."""
    before = sys.stdout, sys.stderr
    scrubbed = ScrubbedStream(before[0]), ScrubbedStream(before[1])
    sys.stdout, sys.stderr = scrubbed
    try:
        yield
    finally:
        for stream in scrubbed:
            stream.finish()
        sys.stdout, sys.stderr = before
