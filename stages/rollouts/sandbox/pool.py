"""Several sandboxes, so that programs run side by side; each is started when it is first needed."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from stages.rollouts.sandbox.sandbox import Sandbox

Result = TypeVar("Result")


class SandboxPool:
    """`workers` sandboxes. Close it, or use it in `with`."""

    def __init__(self, workers: int, make: Callable[[], Sandbox]) -> None:
        """Raises what `make` raises."""
        self._sandboxes = [make() for _ in range(workers)]
        self._free: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()
        for sandbox in self._sandboxes:
            self._free.put(sandbox)

    def __enter__(self) -> SandboxPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, jobs: Sequence[Callable[[Sandbox], Result]]) -> list[Result]:
        """What the jobs return, in their order. Raises what the first of them that fails raises."""
        executor = ThreadPoolExecutor(len(self._sandboxes))
        try:
            return list(executor.map(self._work, jobs))
        finally:
            executor.shutdown(cancel_futures=True)

    def _work(self, job: Callable[[Sandbox], Result]) -> Result:
        sandbox = self._free.get()
        try:
            return job(sandbox)
        finally:
            self._free.put(sandbox)

    def close(self) -> None:
        """End every sandbox."""
        for sandbox in self._sandboxes:
            sandbox.close()
