"""Generations drawn ahead: jobs in line, and what a checkpoint keeps of them."""

from __future__ import annotations

import json
import threading
from concurrent.futures import CancelledError
from dataclasses import replace

import pytest

from stages.data.tokenize import TokenizedPrompt
from stages.rollouts.multi_turn.episode import Episode, Opening
from stages.rollouts.requests import Completion
from stages.training import job_queue
from stages.training.job_queue import JobQueue
from stages.training.occupancy import SAMPLING, WAITING, utilization
from stages.training.rollout_records import Sampled
from stages.training.rollouts_ahead import Drawn
from tests.waiting import LIMIT_SECONDS


def test_jobs_are_done_in_order_beside_whoever_gave_them() -> None:
    line, go, done = JobQueue(), threading.Event(), []

    def job(number: int) -> int:
        assert number or go.wait(LIMIT_SECONDS)
        done.append(number)
        return number

    futures = [line.submit(lambda number=number: job(number)) for number in range(5)]
    assert done == [] and not futures[0].done()
    go.set()
    assert [future.result(60) for future in futures] == done == [0, 1, 2, 3, 4]
    line.close()


def test_after_a_failure_nothing_is_done() -> None:
    line, done = JobQueue(), []
    first = line.submit(lambda: 1 / 0)
    second = line.submit(lambda: done.append(2))
    for future in (first, second):
        with pytest.raises(ZeroDivisionError):
            future.result(60)
    line.close()
    assert done == []


def test_a_closed_line_begins_nothing_and_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_queue, "_PATIENCE_SECONDS", 0.01)
    line, go, running, done = JobQueue(), threading.Event(), threading.Event(), []

    def hangs() -> None:
        running.set()
        go.wait(LIMIT_SECONDS)

    first = line.submit(hangs)
    second = line.submit(lambda: done.append(2))
    assert running.wait(LIMIT_SECONDS)
    line.close()
    assert not first.done()
    go.set()
    first.result(60)
    with pytest.raises(CancelledError):
        second.result(60)
    assert done == []


def test_what_is_drawn_survives_a_checkpoint() -> None:
    """All that training and records ask for, of several turns too; other columns of the dataset need not be JSON."""
    opening = Opening([{"role": "user", "content": "guess"}], [1, 2, 3])
    episode = Episode(
        [{"role": "assistant", "content": "7"}, {"role": "tool", "content": "no"}],
        2,
        "turn limit",
        tool_calls=1,
        environment_rewards=(0.1, None),
        opening=opening,
    )
    turns = Completion([5, 6, 2], [-0.1, 0.0, -1 / 3], True, weight_versions=[4, 4, 4], loss_mask=[True, False, True])
    turns = replace(turns, episode=episode)
    plain = Completion([9], [-1e-17], False, [-0.2], [4])
    prompt = TokenizedPrompt("r1", [1, 2], {"prompt": "p", "when": object()})
    kept = Sampled(prompt, [turns, plain], ["x", "y"], {"r": [1.0, None]}, [1.0, None], weight_version=4)
    drawn = Drawn([kept], [replace(kept, completions=[plain, plain])], {"curriculum/pass_rate": 0.3})
    again = Drawn.of(json.loads(json.dumps(drawn.to_json())))
    lean = replace(prompt, row={"prompt": "p"})
    assert again == Drawn(
        [replace(kept, prompt=lean)], [replace(drawn.replaced[0], prompt=lean)], {"curriculum/pass_rate": 0.3}
    )


def test_shares_of_a_run_by_hand() -> None:
    """Of 20 seconds the trainer waited 5 and the sampler worked 16."""
    assert utilization({WAITING: 5.0, SAMPLING: 16.0}, 20.0) == {
        "rollouts/trainer_utilization": 0.75,
        "rollouts/sampler_utilization": 0.8,
        "rollouts/sampler_idle_seconds": 4.0,
    }
    assert utilization({WAITING: 5.0}, 20.0) == {"rollouts/trainer_utilization": 0.75}
