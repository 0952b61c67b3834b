"""One job at a time beside the loop; its errors come up in the loop."""

from __future__ import annotations

import threading

import pytest

from stages.training.background import Background
from tests.waiting import LIMIT_SECONDS


class Gate:
    """A job that stands still until it is let through."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        self.done = False

    def __call__(self) -> None:
        self.begun.set()
        assert self.open.wait(LIMIT_SECONDS)
        self.done = True


def test_a_job_runs_beside_the_caller() -> None:
    background, job = Background(), Gate()
    background.start(job)
    assert job.begun.wait(LIMIT_SECONDS)
    assert background.busy and not job.done
    background.check()  # nothing to say yet, and no waiting
    job.open.set()
    background.wait()
    assert job.done and not background.busy


def test_at_most_one_is_in_flight_and_order_is_kept() -> None:
    background, order, first = Background(), [], Gate()
    background.start(lambda: (first(), order.append(1)))
    second_begun = threading.Event()

    def caller() -> None:
        background.start(lambda: order.append(2))
        second_begun.set()

    thread = threading.Thread(target=caller)
    thread.start()
    assert first.begun.wait(LIMIT_SECONDS)
    assert not second_begun.is_set() and order == []
    first.open.set()
    thread.join(LIMIT_SECONDS)
    background.wait()
    assert order == [1, 2]


def fail() -> None:
    raise OSError("disk full")


def test_a_failure_is_raised_once_at_the_next_call() -> None:
    background = Background()
    background.start(fail)
    with pytest.raises(OSError, match="disk full"):
        background.wait()
    background.check()
    background.start(fail)
    with pytest.raises(OSError, match="disk full"):
        background.start(lambda: None)


def test_the_block_ends_with_the_job_and_with_its_failure() -> None:
    job = Gate()
    job.open.set()
    with Background() as background:
        background.start(job)
    assert job.done
    with pytest.raises(OSError, match="disk full"), Background() as background:
        background.start(fail)


def test_the_first_error_is_the_one_that_is_raised() -> None:
    with pytest.raises(ValueError, match="the loop's own"), Background() as background:
        background.start(fail)
        raise ValueError("the loop's own")
