"""Monitors against curves made by hand: each speaks of its own trouble, once, at the step where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stages.data.tokenize import MASKED
from stages.data.truncation import COMPLETION_TOO_LONG, PROMPT_TOO_LONG
from stages.monitors import FEW, MONITORS, ROW_MONITORS, UNTRAINED, Watch, notices_of, notices_of_rows
from tests.stages.small_models import read_json

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
        "reward": 0.2 + 0.5 * share,
        "frac_reward_zero_std": 0.3 + 0.3 * share,
        "rewards/length/mean": 0.2,
        "rewards/length/std": 0.1,
        "rewards/correct/mean": 0.5 * share,
        "rewards/correct/std": 0.4,
        "completions/mean_length": 40 + 20 * share,
        "completions/clipped_ratio": 0.3 - 0.2 * share,
        "completions/duplicate_ratio": 0.1 + 0.2 * share,
        "clip_ratio/low_mean": 0.01,
        "clip_ratio/high_mean": 0.1,
        "sampling/sampling_logp_difference/mean": 0.02 + 0.01 * share,
    }


def run(change: Callable[[int], Row] = lambda step: {}, steps: int = 200) -> list[Row]:
    return [{**healthy(step), **change(step)} for step in range(1, steps + 1)]


def test_a_healthy_run_gives_no_notice() -> None:
    assert notices_of(run()) == []


# first step at which the trouble is there by its definition
TROUBLES: dict[str, tuple[Callable[[int], Row], int]] = {
    # one loss of 5
    "loss_spike": (lambda step: {"loss": 5.0} if step == 90 else {}, 90),
    # measured every 20 steps: 2, 1, 1.02, 1.06, of which the last is more than a twentieth above the lowest
    "held_out_rising": (
        lambda step: {} if step % 20 else {"eval/loss": {20: 2.0, 40: 1.0, 60: 1.02}.get(step, 1.06)},
        80,
    ),
    # 1, 2, 1.9, 1.85, 1.79, of which the last is more than a tenth below the highest; training earns more and more
    "held_out_reward_falling": (
        lambda step: {} if step % 20 else {"eval/reward": {20: 1.0, 40: 2.0, 60: 1.9, 80: 1.85}.get(step, 1.79)},
        100,
    ),
    # 2 at first; the mean of 20 is below 0.2 when all but one of them are 0.1: 19 * 0.1 + 1.9 < 20 * 0.2
    "entropy_collapse": (lambda step: {"entropy": 2.0 if step <= 20 else 1.9 if step <= 100 else 0.1}, 119),
    # 1 until step 100, then 0: 4 of the last 20 are left at step 116, which is a fifth
    "margin_collapse": (lambda step: {"rewards/margins": 1.0 if step <= 100 else 0.0}, 116),
    # -40, then -80: the mean of 20 passes -60 when 11 of them are -80
    "chosen_falling": (lambda step: {"logps/chosen": -40.0 if step <= 100 else -80.0}, 111),
    # nothing but chance, said after 100 steps
    "accuracy_at_chance": (lambda step: {"rewards/accuracies": 0.5 + 0.02 * (-1) ** step}, 100),
    # 4, then 40: the mean of 20 passes 6, half as much again, when two of them are 40
    "kl_runaway": (lambda step: {"kl": 4.0 if step <= 100 else 40.0}, 102),
    "not_finite": (lambda step: {"kl": float("nan")} if step == 60 else {}, 60),
    # 0 until step 100, then 1: 18 of 20 are nine in ten
    "no_signal": (lambda step: {"frac_reward_zero_std": float(step > 100)}, 118),
    # half until step 100, then none: of the last 20 there is none at step 120
    "nothing_taught": (
        lambda step: {
            "self_distillation/reprompt_sample_fraction": 0.5 if step <= 100 else 0.0,
            "self_distillation/success_group_fraction": 1.0 if step <= 100 else 0.0,
            "self_distillation/too_long_fraction": 0.0,
        },
        120,
    ),
    # 20 steps of one value
    "constant_reward": (
        lambda step: {"rewards/length/mean": 0.25, "rewards/length/std": 0.0} if step > 50 else {},
        70,
    ),
    # 40, then 80: the mean of the first 20 is 40, so all of the last 20 must be 80
    "length_explosion": (lambda step: {"completions/mean_length": 40.0 if step <= 100 else 80.0}, 120),
    # 0.25, then 1: the mean of 20 is 0.5 or more when 7 of them are 1: 13 * 0.25 + 7 = 10.25
    "truncation": (lambda step: {"completions/clipped_ratio": 0.25 if step <= 100 else 1.0}, 107),
    "duplicates": (lambda step: {"completions/duplicate_ratio": float(step > 100)}, 110),
    # 0.11, then 0.2 and 0.3: 10 of 20 make 0.305
    "clip_fraction": (
        lambda step: {"clip_ratio/low_mean": 0.2, "clip_ratio/high_mean": 0.3} if step > 100 else {},
        110,
    ),
    # 0.02 at first; the mean of 5 passes ten times that when four of them are 0.25: (4 * 0.25 + 0.03) / 5 = 0.206
    "sampler_mismatch": (
        lambda step: {"sampling/sampling_logp_difference/mean": 0.25 if step > 100 else 0.02 + 0.0001 * step},
        104,
    ),
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


def test_what_keeps_a_teacher_silent() -> None:
    """No success, or prompts that are too long; groups of equal rewards that are taught are no trouble."""
    told = {f"self_distillation/{name}": 0.0 for name in ("reprompt_sample_fraction", "success_group_fraction")}
    texts = []
    for too_long, succeeded in ((0.0, 0.0), (0.5, 1.0)):
        more = {"self_distillation/too_long_fraction": too_long, "self_distillation/success_group_fraction": succeeded}
        rows = [{"step": step, "frac_reward_zero_std": 0.0, **told, **more} for step in range(1, 30)]
        (notice,) = notices_of(rows)
        texts.append(notice.text)
    assert "success_reward_threshold" in texts[0] and "max_reprompt_len" not in texts[0]
    assert "max_reprompt_len" in texts[1] and "success_reward_threshold" not in texts[1]
    taught = [{**row, "frac_reward_zero_std": 1.0, "self_distillation/reprompt_sample_fraction": 0.5} for row in rows]
    assert notices_of(taught) == []
    few = [{**row, "self_distillation/reprompt_sample_fraction": 0.01} for row in taught]
    assert [notice.monitor for notice in notices_of(few)] == ["no_signal"]


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


@pytest.mark.parametrize(
    ("monitor", "change"),
    [
        # a reward of 0 and 1 in equal parts does vary, though its spread is the same in every step
        ("constant_reward", lambda step: {"rewards/correct/mean": 0.5, "rewards/correct/std": 0.5}),
        # each step's completions get one value, but not the same one
        ("constant_reward", lambda step: {"rewards/correct/mean": step / 200, "rewards/correct/std": 0.0}),
        # numbers of three digits, of which most of a group are right
        ("duplicates", lambda step: {"completions/duplicate_ratio": 0.95, "completions/mean_length": 3.3}),
        # rounding in bfloat16, and in float32, where ten times the first difference is nothing
        ("sampler_mismatch", lambda step: {"sampling/sampling_logp_difference/mean": 0.02 + 0.01 * (step % 3)}),
        ("sampler_mismatch", lambda step: {"sampling/sampling_logp_difference/mean": 1e-8 if step == 1 else 5e-7}),
        # up and down, and a little up
        ("held_out_rising", lambda step: {} if step % 20 else {"eval/loss": 1.1 if step % 40 else 1.0}),
        ("held_out_rising", lambda step: {} if step % 20 else {"eval/loss": 1.0 + step / 5000}),
        # up and down; a little down; down, as what training earns
        ("held_out_reward_falling", lambda step: {} if step % 20 else {"eval/reward": 1.0 if step % 40 else 2.0}),
        ("held_out_reward_falling", lambda step: {} if step % 20 else {"eval/reward": -1.0 - step / 5000}),
        (
            "held_out_reward_falling",
            lambda step: {"reward": -step} | ({} if step % 20 else {"eval/reward": -float(step)}),
        ),
        # half as long again
        ("length_explosion", lambda step: {"completions/mean_length": 40 + step / 10}),
    ],
)
def test_what_looks_like_trouble_and_is_none(monitor: str, change: Callable[[int], Row]) -> None:
    assert monitor not in [notice.monitor for notice in notices_of(run(change))]


def test_kl_of_tokens_and_of_completions() -> None:
    """On-line it is of tokens, and far from 1 nat on. Of completions 4 nats are not far; the mean of 20 passes 10 when
    four of them are 40."""
    rows = run(lambda step: {"kl": 0.4 if step <= 100 else 4.0})
    (notice,) = notices_of(rows)
    assert notice.step == 104 and "reference 1.12 a token, 0.4 20 steps before" in notice.text
    offline = [{"step": row["step"], "kl": 10 * row["kl"]} for row in rows]
    (notice,) = notices_of(offline)
    assert notice.step == 104 and "reference 11.2, 4 20 steps before" in notice.text
    assert notices_of([{**row, "kl": row["kl"] / 10} for row in offline]) == []


def test_numbers_are_in_the_notices() -> None:
    """Of rewards that vary in no group, and of the one function among two that never does."""
    flat = {"frac_reward_zero_std": 1.0, "reward": 0.25, "rewards/length/mean": 0.25, "rewards/length/std": 0.0}
    silent, constant = notices_of(run(lambda step: flat))
    assert (silent.monitor, silent.step, constant.monitor, constant.step) == ("no_signal", 20, "constant_reward", 20)
    assert "100% of the groups of the last 20 steps have equal rewards (mean reward 0.25)" in silent.text
    assert "from length (0.25):" in constant.text
    longer = TROUBLES["length_explosion"][0]
    (notice,) = notices_of(run(lambda step: {**longer(step), "reward": 0.1 if step <= 100 else 0.6}))
    assert "completions of 80 tokens, 40 at the start, while the reward went up from 0.1 to 0.6" in notice.text


def test_a_curve_with_a_hole_goes_on_beside_it() -> None:
    """A step whose loss is no number is said, and no other monitor mistakes it for a spike."""
    rows = run(lambda step: {"loss": float("inf")} if step == 90 else {})
    assert [(notice.monitor, notice.step) for notice in notices_of(rows)] == [("not_finite", 90)]


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "grpo", "student"])
def test_the_quickstart_raises_no_alarm(stage: str) -> None:
    """Every curve of its training stages, as a run on two cores gave them (four digits of each value)."""
    curves = read_json(Path(__file__).parent / "quickstart_curves.json")[stage]
    rows = [dict(zip(curves, values, strict=True)) for values in zip(*curves.values(), strict=True)]
    assert len(rows) == {"sft": 600, "dpo": 53, "reward": 158, "grpo": 100, "student": 650}[stage]
    assert notices_of({"step": step, **row} for step, row in enumerate(rows, start=1)) == []


def test_a_short_run_is_left_alone() -> None:
    assert notices_of(run(lambda step: {"loss": float(step % 7)}, steps=FEW)) == []
