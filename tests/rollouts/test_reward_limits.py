"""Rewards slower than their limit, stubborn ones among them."""

from __future__ import annotations

import signal
import threading
import time
from types import SimpleNamespace

import pytest

from artifacts.errors import StageError
from stages.rollouts import reward_limits
from stages.rollouts.reward_base import OvertimeError
from stages.rollouts.reward_limits import limited
from stages.rollouts.rewards import RewardSet
from tests.rollouts.scored import prompts, score, spec

# each ends never for completion 'b', and gives 1 for all others; the sync ones have the alarm ring early, so that no
# test waits, and no busy machine makes the others slow
RING = "signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)"
SLOW = {
    "a loop": (
        "import signal\ndef judge(completions, **_):\n"
        "    while 'b' in completions: signal.raise_signal(signal.SIGALRM)\n"
        "    return [1.0] * len(completions)\n"
    ),
    "a sleeper": (
        "import signal, time\ndef judge(completions, **_):\n    if 'b' in completions:\n"
        f"        {RING}\n        time.sleep(600)\n    return [1.0] * len(completions)\n"
    ),
    "one that catches everything": (
        f"import signal, time\ndef judge(completions, **_):\n    'b' in completions and {RING}\n"
        "    for _ in range(3):\n"
        "        try:\n            'b' in completions and time.sleep(600)\n        except BaseException: pass\n"
        "    return [1.0] * len(completions)\n"
    ),
    "async": (
        "import asyncio\nasync def judge(completions, **_):\n    'b' in completions and await asyncio.sleep(600)\n"
        "    return [1.0] * len(completions)\n"
    ),
}


# in place of `signal`: limits count the time of the processor, and not what a busy machine takes away
PROCESSOR_TIME = SimpleNamespace(
    SIGALRM=signal.SIGPROF, ITIMER_REAL=signal.ITIMER_PROF, signal=signal.signal, setitimer=signal.setitimer
)


@pytest.fixture(params=SLOW)
def slow(request, tmp_path):
    (tmp_path / "judges.py").write_text(SLOW[request.param])
    # an async function that does not wait cannot be late
    return spec(f"{tmp_path}/judges.py:judge", timeout_seconds=0.1 if request.param == "async" else 600)


def test_the_error_names_row_and_completion(slow):
    with pytest.raises(
        StageError,
        match=r"'judge' took longer than its limit, timeout_seconds: (0\.1|600) for row row1, completion 0: 'b'",
    ):
        score(RewardSet([slow]), prompts("x", "y"), [["a", "a"], ["b", "c"]])


def test_or_the_slow_one_is_not_scored(slow):
    rewards = RewardSet(["exact_match", slow.model_copy(update={"on_timeout": "none"})])
    scores = score(rewards, prompts("a", "a"), [["a", "a"], ["b", "c"]])
    assert scores.by_function["judge"] == [[1.0, 1.0], [None, 1.0]]
    assert scores.totals == [[2.0, 2.0], [0.0, 1.0]]


def test_slow_only_together(tmp_path):
    (tmp_path / "judges.py").write_text(
        "import signal, time\ndef judge(completions, **_):\n    if len(completions) > 1:\n"
        f"        {RING}\n        time.sleep(600)\n    return [1.0]\n"
    )
    rewards = RewardSet([spec(f"{tmp_path}/judges.py:judge", timeout_seconds=600)])
    with pytest.raises(StageError, match=r"timeout_seconds: 600 for 2 completions together, though not for any alone"):
        score(rewards, prompts("x"), [["a", "b"]])


def test_a_time_out_of_the_functions_own_is_an_error_like_others(tmp_path):
    (tmp_path / "judges.py").write_text("async def judge(completions, **_):\n    raise TimeoutError('mine')\n")
    rewards = RewardSet([spec(f"{tmp_path}/judges.py:judge", timeout_seconds=60, on_timeout="none")])
    with pytest.raises(StageError, match=r"raised TimeoutError: mine \(judges\.py:2\), for row row0, completion 0"):
        score(rewards, prompts("x"), [["a"]])


def test_a_careless_pattern_is_stopped(monkeypatch):
    monkeypatch.setattr(reward_limits, "signal", PROCESSOR_TIME)
    fields = {"parameters": {"pattern": "(a+)+b"}, "timeout_seconds": 0.1}
    with pytest.raises(StageError, match=r"'regular_expression' took longer .* for row row0, completion 1: 'aaaa"):
        score(RewardSet([spec("regular_expression", **fields)]), prompts("x"), [["ab", "a" * 60]])
    rewards = RewardSet([spec("regular_expression", **fields, on_timeout="none")])
    assert score(rewards, prompts("x"), [["ab", "a" * 60]]).totals == [[1.0, None]]
    schema = {"expected": {"type": "string", "pattern": "^(a+)+b$"}}
    rewards = RewardSet([spec("json_schema", parameters=schema, timeout_seconds=0.1, on_timeout="none")])
    assert score(rewards, prompts("x"), [['"ab"', '"' + "a" * 60 + '"']]).totals == [[1.0, None]]


def test_patterns_have_a_limit_where_none_is_given():
    assert all(
        RewardSet([spec(name, parameters=parameters)])._functions[0].timeout_seconds == 10.0
        for name, parameters in (("regular_expression", {"pattern": "a"}), ("json_schema", {"expected": {}}))
    )


def test_a_timer_that_somebody_set_goes_on():
    before = signal.getitimer(signal.ITIMER_REAL)
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 300)
        assert limited(lambda: signal.getitimer(signal.ITIMER_REAL)[0], 100) <= 100
        assert 100 < signal.getitimer(signal.ITIMER_REAL)[0] <= 300
        with pytest.raises(OvertimeError):
            limited(signal.pause, 0.01)
        assert 100 < signal.getitimer(signal.ITIMER_REAL)[0] <= 300
        signal.raise_signal(signal.SIGALRM)
        assert rung == [1]
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_errors_inside_pass_through():
    for seconds in (None, 100):
        with pytest.raises(ZeroDivisionError):
            limited(lambda: 1 / 0, seconds)
        assert limited(lambda: 7, seconds) == 7


def in_a_thread(compute, seconds):
    """What `limited` gives or raises there."""
    found = []

    def work():
        try:
            found.append(limited(compute, seconds))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_limits_hold_in_other_threads():
    """Where rewards are computed ahead of the training: an endless loop ends, also one that catches everything once."""
    caught = []

    def endless():
        while True:
            try:
                while True:
                    pass
            except BaseException:
                if caught:
                    raise
                caught.append(1)

    assert in_a_thread(lambda: 7, 600) == 7
    assert isinstance(in_a_thread(lambda: 1 / 0, 600), ZeroDivisionError)
    error = in_a_thread(endless, 0.05)
    assert isinstance(error, OvertimeError) and caught == [1]
    assert not [thread for thread in threading.enumerate() if thread.name == "reward"]


class SlowToEnd(threading.Event):
    """Whoever sets it comes to its end a while later, as on a busy machine."""

    def set(self):
        super().set()
        time.sleep(0.2)


def test_nothing_of_it_is_left_where_the_thread_is_slow_to_end(monkeypatch):
    names = {name: getattr(threading, name) for name in ("Thread", "current_thread", "main_thread")}
    monkeypatch.setattr(reward_limits, "threading", SimpleNamespace(**names, Event=SlowToEnd))

    def endless():
        while True:
            pass

    for compute, seconds in ((lambda: 7, 600), (endless, 0.05)):
        in_a_thread(compute, seconds)
        assert not [thread for thread in threading.enumerate() if thread.name == "reward"]


def test_what_waits_outside_python_is_left_behind(monkeypatch):
    monkeypatch.setattr(reward_limits, "_LEFT_BEHIND_SECONDS", 0.01)
    go = threading.Event()
    lock = threading.Lock()
    lock.acquire()

    def waits():
        lock.acquire()
        go.set()

    assert isinstance(in_a_thread(waits, 0.05), OvertimeError)
    assert not go.is_set()
    lock.release()


def test_a_limit_that_is_over_before_the_function_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alarm rings inside of the call that sets it."""
    before = signal.getsignal(signal.SIGALRM)

    def rings(which: int, seconds: float, interval: float = 0.0) -> tuple[float, float]:
        if seconds == 1e-6:  # pytest has a timer of its own, which goes on afterwards
            signal.raise_signal(signal.SIGALRM)
        return signal.setitimer(which, seconds, interval)

    names = {"SIGALRM": signal.SIGALRM, "ITIMER_REAL": signal.ITIMER_REAL, "signal": signal.signal}
    monkeypatch.setattr(reward_limits, "signal", SimpleNamespace(**names, setitimer=rings))
    with pytest.raises(OvertimeError, match="took longer than its limit"):
        limited(lambda: 1.0, 1e-6)
    assert signal.getsignal(signal.SIGALRM) == before
