"""What runs beside each other share while a stage works: the lease of its fingerprint, and slots of the machine."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

from artifacts import Lease
from artifacts.errors import StoreError
from flows.stage_result import StageStopped

logger = logging.getLogger(__name__)

LEASE_POLL_SECONDS = 1.0

Occupy = Callable[[Mapping[str, int], threading.Event, Callable[[str], None]], AbstractContextManager[None]]
"""`occupy(slots, stopping, tell)`: holds the slots while the block runs; see `flows.prefect_slots`."""


def no_slots(
    slots: Mapping[str, int], stopping: threading.Event, tell: Callable[[str], None]
) -> AbstractContextManager[None]:
    """Where there is no Prefect, nobody counts slots."""
    return contextlib.nullcontext()


@contextlib.contextmanager
def holding(lease: Lease, stage: str, stopping: threading.Event, say: Callable[[str], None]) -> Iterator[None]:
    """Have the lease of a stage while the block runs; where another run has it, wait until it gives it back, and say so
    once. Raises StageStopped where `stopping` is set first."""
    said = False
    while not lease.acquire():
        if not said:
            holder = lease.holder() or {}
            say(f"run {holder.get('owner', 'unknown')} works on the same; waiting for its result")
            said = True
        if stopping.wait(LEASE_POLL_SECONDS):
            raise StageStopped(f"stage {stage} was not started: the run ended", expected=True)
    try:
        yield
    finally:
        try:
            lease.release()
        except StoreError as error:  # it expires by itself; what was made stands
            logger.warning("the lease of %s was not given back: %s", stage, error)


@contextlib.contextmanager
def renewing(lease: Lease) -> Iterator[None]:
    """Keep a lease young from a thread while the block runs."""

    def renew(done: threading.Event) -> None:
        while not done.wait(lease.renew_every):
            try:
                if not lease.renew():
                    logger.warning("another run took over the lease; both results will be right")
                    return
            except StoreError as error:  # the next renewal may get through
                logger.warning("the lease was not renewed: %s", error)

    with beside(renew):
        yield


@contextlib.contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """`work(done)` in a thread while the block runs; it returns when `done` is set."""
    done = threading.Event()
    thread = threading.Thread(target=work, args=(done,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
