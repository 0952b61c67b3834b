"""Monitors against curves made by hand: each speaks of its own trouble, once, at the step where it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stages.data.tokenize import MASKED
from stages.data.truncation import COMPLETION_TOO_LONG, PROMPT_TOO_LONG
from stages.monitors import FEW, MONITORS, ROW_MONITORS, UNTRAINED, Watch, notices_of, notices_of_rows

Row = dict[str, float]


def healthy(step: int) -> Row:
    """A run that learns: loss and entropy fall a little, margins and accuracy rise."""
    share = step / 200
    return {
        "step": step,
        "loss": 0.69 - 0.4 * share + 0.01 * (-1) ** step,
        "entropy": 2.0 - share,
        "rewards/margins": 2 * share,
        "rewards/accuracies": min(1.0, 0.5 + share),
        "logps/chosen": -40.0 - 5 * share,
        "kl": 3 * share,
    }


def run(change: Callable[[int], Row] = lambda step: {}, steps: int = 200) -> list[Row]:
    return [{**healthy(step), **change(step)} for step in range(1, steps + 1)]


def test_a_healthy_run_gives_no_notice() -> None:
    assert notices_of(run()) == []


# first step at which the trouble is there by its definition
TROUBLES: dict[str, tuple[Callable[[int], Row], int]] = {
    # one loss of 5
    "loss_spike": (lambda step: {"loss": 5.0} if step == 90 else {}, 90),
    # 2 at first; the mean of 20 is below 0.2 when all but one of them are 0.1: 19 * 0.1 + 1.9 < 20 * 0.2
    "entropy_collapse": (lambda step: {"entropy": 2.0 if step <= 20 else 1.9 if step <= 100 else 0.1}, 119),
    # 1 until step 100, then 0: 4 of the last 20 are left at step 116, which is a fifth
    "margin_collapse": (lambda step: {"rewards/margins": 1.0 if step <= 100 else 0.0}, 116),
    # -40, then -80: the mean of 20 passes -60 when 11 of them are -80
    "chosen_falling": (lambda step: {"logps/chosen": -40.0 if step <= 100 else -80.0}, 111),
    # nothing but chance, said after 100 steps
    "accuracy_at_chance": (lambda step: {"rewards/accuracies": 0.5 + 0.02 * (-1) ** step}, 100),
    # 4, then 40: the mean of 20 passes 10 when 4 of them are 40
    "kl_runaway": (lambda step: {"kl": 4.0 if step <= 100 else 40.0}, 104),
}


def test_every_monitor_is_tried() -> None:
    assert set(TROUBLES) == set(MONITORS)


@pytest.mark.parametrize("name", TROUBLES)
def test_trouble(name: str) -> None:
    change, step = TROUBLES[name]
    notices = notices_of(run(change))
    assert [(notice.monitor, notice.step) for notice in notices] == [(name, step)]
    assert str(notices[0]).startswith(f"step {step}: {name}: ")


@pytest.mark.parametrize("name", TROUBLES)
def test_a_resumed_run_says_nothing_twice(name: str) -> None:
    change, step = TROUBLES[name]
    rows = run(change)
    for resumed_at in (step - 1, step):
        watch = Watch(rows[:resumed_at])
        later = [notice.step for row in rows[resumed_at:] for notice in watch.look(row)]
        assert later == ([step] if resumed_at < step else [])


def test_a_model_of_rewards_at_chance() -> None:
    """Its accuracy has another name."""
    rows = [{"step": step, "loss": 0.69, "accuracy": 0.49 + 0.02 * (step % 2)} for step in range(1, 121)]
    assert [(notice.monitor, notice.step) for notice in notices_of(rows)] == [("accuracy_at_chance", 100)]


def test_healthy_judged_completions() -> None:
    """KTO's curves: margins from the two kinds' means, chosen ones that fall a little."""
    rows = [{**healthy(step), "rewards/chosen": step / 200, "rewards/rejected": -step / 200} for step in range(1, 201)]
    assert notices_of([{name: row[name] for name in row if name != "rewards/accuracies"} for row in rows]) == []


@pytest.mark.parametrize(
    ("states", "said"),
    [
        # a hundredth of the rows, and less
        ({"used": 99, "masked": 1}, "1 masked of 100 rows"),
        ({"used": 100, "masked": 1}, None),
        ({"used": 4, "truncated": 4, "filtered: prompt too long": 2, "masked": 3}, "2 filtered: prompt too long and 3"),
        # truncation_mode keep_end
        ({"used": 50, "filtered: completion too long": 50}, "50 filtered: completion too long of 100 rows"),
        # lost for other reasons
        ({"used": 4, "filtered: chosen equals rejected": 9}, None),
        ({"used": 4, "filtered: longer than max_length": 9}, None),  # truncation_mode drop asks for it
        ({"used": 7}, None),
        ({}, None),
    ],
)
def test_rows_of_which_nothing_is_trained(states: dict[str, int], said: str | None) -> None:
    assert set(ROW_MONITORS) == {"masked_rows"} and set(UNTRAINED) == {
        MASKED,
        PROMPT_TOO_LONG,
        COMPLETION_TOO_LONG,
    }
    notices = [str(notice) for notice in notices_of_rows(states)]
    assert len(notices) == (said is not None)
    assert said is None or notices[0].startswith(f"step 0: masked_rows: {said}")


def test_a_short_run_is_left_alone() -> None:
    assert notices_of(run(lambda step: {"loss": float(step % 7)}, steps=FEW)) == []
