"""Jobs one after the other in a thread beside the training loop, in the order in which they were given."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

_PATIENCE_SECONDS = 30.0
"""How long a run that has failed waits for the job in flight."""


class JobQueue:
    """After a job that fails none is done: those behind it fail as it did, for each goes on from the one before."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._is_closed = False

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Its result, or what it raised, once its turn has come and gone."""
        future: Future[T] = Future()
        self._jobs.put((future, job))
        if self._thread is None:
            # a daemon: an interpreter that ends in an error does not wait for a server that never answers
            self._thread = threading.Thread(target=self._work, name="job queue", daemon=True)
            self._thread.start()
        return future

    def close(self) -> None:
        """No further job begins; waits for the one in flight, though not for ever."""
        self._is_closed = True
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(_PATIENCE_SECONDS)

    def _work(self) -> None:
        while self._does_next():
            pass

    def _does_next(self) -> bool:
        """Lets go of the job, and of what it holds, before it waits for another one."""
        if (entry := self._jobs.get()) is None:
            return False
        future, job = entry
        if self._is_closed:
            future.cancel()
        elif self._failure is not None:
            future.set_exception(self._failure)
        else:
            self._do(future, job)
        return True

    def _do(self, future: Future[Any], job: Callable[[], Any]) -> None:
        try:
            result = job()
        except BaseException as error:
            self._failure = error
            future.set_exception(error)
        else:
            future.set_result(result)
