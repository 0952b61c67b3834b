"""Rewards slower than their limit, stubborn ones among them."""

from __future__ import annotations

import signal
import threading

import pytest

from artifacts.errors import StageError
from stages.rollouts.reward_base import OvertimeError
from stages.rollouts.reward_limits import limit
from stages.rollouts.rewards import RewardSet
from tests.rollouts.scored import prompts, score, spec

# each ends never for completion 'b', and gives 1 for all others
SLOW = {
    "a loop": "def judge(completions, **_):\n    while 'b' in completions: pass\n    return [1.0] * len(completions)\n",
    "a sleeper": (
        "import time\ndef judge(completions, **_):\n    'b' in completions and time.sleep(600)\n"
        "    return [1.0] * len(completions)\n"
    ),
    "one that catches everything": (
        "import time\ndef judge(completions, **_):\n    for _ in range(3):\n"
        "        try:\n            'b' in completions and time.sleep(600)\n        except BaseException: pass\n"
        "    return [1.0] * len(completions)\n"
    ),
    "async": (
        "import asyncio\nasync def judge(completions, **_):\n    'b' in completions and await asyncio.sleep(600)\n"
        "    return [1.0] * len(completions)\n"
    ),
}


@pytest.fixture(params=SLOW)
def slow(request, tmp_path):
    (tmp_path / "judges.py").write_text(SLOW[request.param])
    return f"{tmp_path}/judges.py:judge"


def test_the_error_names_row_and_completion(slow):
    rewards = RewardSet([spec(slow, timeout_seconds=0.1)])
    with pytest.raises(
        StageError,
        match=r"'judge' took longer than its limit, timeout_seconds: 0\.1 for row row1, completion 0: 'b'",
    ):
        score(rewards, prompts("x", "y"), [["a", "a"], ["b", "c"]])


def test_or_the_slow_one_is_not_scored(slow):
    rewards = RewardSet(["exact_match", spec(slow, timeout_seconds=0.1, on_timeout="none")])
    scores = score(rewards, prompts("a", "a"), [["a", "a"], ["b", "c"]])
    assert scores.by_function["judge"] == [[1.0, 1.0], [None, 1.0]]
    assert scores.totals == [[2.0, 2.0], [0.0, 1.0]]


def test_slow_only_together(tmp_path):
    (tmp_path / "judges.py").write_text(
        "import time\ndef judge(completions, **_):\n    len(completions) > 1 and time.sleep(600)\n    return [1.0]\n"
    )
    rewards = RewardSet([spec(f"{tmp_path}/judges.py:judge", timeout_seconds=0.1)])
    with pytest.raises(StageError, match=r"timeout_seconds: 0\.1 for 2 completions together, though not for any alone"):
        score(rewards, prompts("x"), [["a", "b"]])


def test_a_time_out_of_the_functions_own_is_an_error_like_others(tmp_path):
    (tmp_path / "judges.py").write_text("async def judge(completions, **_):\n    raise TimeoutError('mine')\n")
    rewards = RewardSet([spec(f"{tmp_path}/judges.py:judge", timeout_seconds=60, on_timeout="none")])
    with pytest.raises(StageError, match=r"raised TimeoutError: mine, for row row0, completion 0"):
        score(rewards, prompts("x"), [["a"]])


def test_a_careless_pattern_is_stopped():
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
        with limit(100):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        assert 100 < signal.getitimer(signal.ITIMER_REAL)[0] <= 300
        with pytest.raises(OvertimeError), limit(0.01):
            signal.pause()
        assert 100 < signal.getitimer(signal.ITIMER_REAL)[0] <= 300
        signal.raise_signal(signal.SIGALRM)
        assert rung == [1]
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_errors_inside_pass_through():
    with pytest.raises(ZeroDivisionError), limit(100):
        _ = 1 / 0
    with limit(None):
        pass


def test_outside_the_main_thread_a_limit_is_refused():
    found = []

    def work():
        try:
            with limit(1):
                pass
        except StageError as error:
            found.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [
        "timeout_seconds of a reward works in the main thread only; call from there, or leave it out",
    ]
