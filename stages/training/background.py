"""One job at a time in a thread beside the training loop."""

from __future__ import annotations

import threading
from collections.abc import Callable

_PATIENCE_SECONDS = 30.0
"""How long a run that has failed waits for the job in flight; it may depend on a process that is gone."""


class Background:
    """What a job raises is raised by the next call here. Leaving the `with` block waits for the job in flight."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], None]) -> None:
        """Waits for the job before, and begins this one."""
        self.wait()
        # a daemon: an interpreter that ends in an error does not wait for a store that never answers
        self._thread = threading.Thread(target=self._run, args=(job,), name="background", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises what a finished job raised."""
        if not self.busy:
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Until no job is in flight, or so long; raises what it raised."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:  # the first error is the one to report
            self._thread.join(_PATIENCE_SECONDS)

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error
